"""A model of Llama 3 8B's shape, random FP8 weights and FP8 KV, from prompts to tokens."""

import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from baton import LLM, SamplingParams
from benchmarks.gpu_check.report import Report
from common.engine.config import ModelConfig
from common.engine.models.llama import tensor_shapes

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TINY = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
# Published for this model and shape on one H200 (TensorRT-LLM), and what comes after it.
TARGETS = "targets on an H200: 400 tokens/s at batch 1; 17,744 then 21,500 at 1000/1000"
GIB = 2**30
# Beside weights and KV: activations, graphs, and what the allocator keeps.
SPARE_BYTES = 12 * GIB


def run(report: Report) -> None:
    folder = Path(tempfile.mkdtemp(prefix="baton-gpu-check-", dir=place()))
    try:
        with report.guard("batch invariance"):
            invariance(report, folder / "small")
        with report.guard("making a model"):
            began = time.monotonic()
            make_model(report, folder, TINY if report.tiny else LLAMA_3_8B)
            report.line(f"random weights written in {time.monotonic() - began:.0f} s")
        with report.guard("serving"):
            serve(report, folder)
    finally:
        shutil.rmtree(folder)


def place() -> str | None:
    """Memory if it has room for the weights, else the usual folder."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 16 * GIB else None


def invariance(report: Report, folder: Path) -> None:
    """What one request's tokens are given as log-probabilities, whatever is in its steps."""
    folder.mkdir()
    make_model(report, folder, TINY)
    others = 64 if report.gpu else 1
    drawn = torch.randint(0, 128, (1 + others, 40), generator=torch.Generator().manual_seed(2))
    prompts = [{"prompt_token_ids": row} for row in drawn.tolist()]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)

    def told(chunk: int, *batches: list[dict]) -> list[torch.Tensor]:
        llm = LLM(
            folder,
            kv_cache_dtype="fp8_e4m3",
            max_model_len=64,
            max_num_seqs=1 + others,
            max_num_batched_tokens=chunk,
            num_blocks=4 * (2 + others),
            device=report.device.type,
            kernels="triton",
            batch_invariant=True,
        )
        try:
            answers = [llm.generate(batch, params, use_tqdm=False)[0] for batch in batches]
        finally:
            llm.close()
        return [
            torch.tensor([next(iter(step.values())).logprob for step in a.outputs[0].logprobs])
            for a in answers
        ]

    alone, again = told(64, prompts[:1], prompts[:1])
    (among,) = told(64, prompts)
    (chunked,) = told(16, prompts)
    cases = {"after a prefix hit": again, f"among {others} more": among, "in chunks": chunked}
    for case, actual in cases.items():
        if report.gpu:
            report.same(f"log-probabilities alone and {case}", actual, alone)
        else:  # a CPU's float32 products are torch's own
            report.close(f"log-probabilities alone and {case}", actual, alone, 1e-2)


def make_model(report: Report, folder: Path, sizes: dict[str, float]) -> None:
    """A folder as llm-compressor writes it: e4m3 with a scale a row, tokens scaled as they come."""
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**fp8, "strategy": "channel", "dynamic": False},
        "input_activations": {**fp8, "strategy": "token", "dynamic": True},
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16" if report.gpu else "float32",
        "rms_norm_eps": 1e-5,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        },
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in tensor_shapes(ModelConfig.from_folder(folder)).items():
        # One file a layer, and one for the rest.
        shard = shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})
        shard.update(random_tensor(report, name, shape))
    index = {}
    for number, (part, tensors) in enumerate(shards.items()):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
        shards[part] = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def random_tensor(report: Report, name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    if "norm" in name:
        return {name: torch.ones(shape, dtype=torch.bfloat16)}
    if ".layers." not in name:
        return {name: (report.random(*shape) * 0.02).to(torch.bfloat16).cpu()}
    scale = torch.full((shape[0], 1), 0.02 / 64, dtype=torch.float32)
    return {name: report.random_e4m3(*shape).cpu(), f"{name}_scale": scale}


def serve(report: Report, folder: Path) -> None:
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    settings = {"max_model_len": 64, "max_num_batched_tokens": 32, "num_blocks": 40}
    most = 2
    if report.gpu:
        free, _ = torch.cuda.mem_get_info()
        most = 512
        settings = {"max_model_len": 2048, "max_num_batched_tokens": 8192, "num_blocks": None}
        settings["kv_cache_bytes"] = int(free - weights - SPARE_BYTES)
    began = time.monotonic()
    llm = LLM(
        folder,
        kv_cache_dtype="fp8_e4m3",
        max_num_seqs=most,
        device=report.device.type,
        kernels="triton",
        async_scheduling=True,
        # Random prompts have no common prefix: no time is spent on looking for one.
        enable_prefix_caching=False,
        **settings,
    )
    report.line(f"loaded, compiled and captured in {time.monotonic() - began:.0f} s")
    try:
        measure(report, llm, weights)
    finally:
        llm.close()


def measure(report: Report, llm: LLM, weights: int) -> None:
    copy = report.copy_rate()
    token_bytes = llm.engine.runner.layout.block_bytes / llm.engine.runner.layout.block_size
    # The embedding is looked up, not read: a step reads all other weights once.
    config = llm.engine.runner.model_config
    read = weights - 2 * config.vocab_size * config.hidden_size
    if report.gpu:
        runs = [(b, b, 1024, 512) for b in (1, 32, 128, 256)] + [(512, 512, 1000, 1000)]
        report.line(TARGETS)
    else:
        runs = [(1, 1, 5, 3), (2, 2, 4, 3)]
    once(llm, 1, 4, 2)
    for requests, batch, before, after in runs:
        seconds, told = once(llm, requests, before, after)
        steps = requests * after / batch
        floor = steps * (read + batch * (before + after / 2) * token_bytes) / copy
        rate = requests * after / seconds
        report.line(
            f"{requests} requests of {before}/{after}, {batch} at a time: {rate:.0f} output "
            f"tokens/s in {seconds:.1f} s; reading weights and KV alone: "
            f"{requests * after / floor:.0f} tokens/s"
        )
        report.check("   all tokens came", told == requests * after)


def once(llm: LLM, requests: int, before: int, after: int) -> tuple[float, int]:
    """Seconds for all of them, prompts included, and the tokens that came."""
    vocab = llm.engine.runner.model_config.vocab_size
    drawn = torch.randint(0, vocab, (requests, before), generator=torch.Generator().manual_seed(1))
    prompts = [{"prompt_token_ids": row} for row in drawn.tolist()]
    params = SamplingParams(temperature=0, max_tokens=after, ignore_eos=True)
    began = time.perf_counter()
    results = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return seconds, sum(len(result.outputs[0].token_ids) for result in results)
