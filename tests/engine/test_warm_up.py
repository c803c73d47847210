"""What an engine runs before anybody's request leaves nothing to compile for later ones."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton import LLM
from common.engine.warm_up import warm_up_request
from common.errors import BatonError
from tests.engine import zoo
from tests.support.mesh import ROOT

# Kernels are made by cached functions: what these lack after the constructor, a request waits for.
REQUESTS = """
import importlib, pkgutil, sys
from baton import LLM, SamplingParams
from common.engine.kernels import cpu

names = [m.name for m in pkgutil.iter_modules(cpu.__path__, cpu.__name__ + ".")]
modules = [importlib.import_module(name) for name in names]
makers = {f for m in modules for f in vars(m).values() if "_kernel" in getattr(f, "__name__", "")}

def kernels():
    return sum(f.cache_info().currsize for f in makers if hasattr(f, "cache_info"))

before = kernels()
path, quantization = sys.argv[1:]
llm = LLM(path, dtype="bfloat16", quantization=quantization or None, kv_cache_dtype="fp8_e4m3")
warm = kernels()
for lengths in ([1], [200], [3, 17, 40, 90, 5]):
    prompts = [{"prompt_token_ids": [7] * length} for length in lengths]
    llm.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
print(before, warm, kernels())
"""


@pytest.mark.parametrize("quantization", ["", "fp8-block"])
def test_no_request_of_an_llm_waits_for_a_compiler(quantization, tmp_path):
    path = zoo.make_checkpoint("llama", False, tmp_path, head_dim=64)
    command = [sys.executable, "-c", REQUESTS, path, quantization]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    before, warm, after = map(int, done.stdout.split())
    assert before == 0
    assert warm > 6
    assert after == warm


@pytest.mark.parametrize("most", [2, 3, 40, 4096])
def test_the_first_request_fits_into_the_shortest_sequence(most):
    request = warm_up_request(most)
    asked = len(request.prompt_token_ids) + request.params.max_tokens
    assert 2 <= asked <= most


def test_a_model_that_cannot_run_is_told_by_the_constructor(tmp_path):
    path = zoo.make_checkpoint("llama", False, tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BatonError, match="NaN"):
        LLM(path, threads=1)
