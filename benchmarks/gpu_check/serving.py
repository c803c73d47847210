"""A model of Llama 3 8B's shape, random FP8 weights and FP8 KV, from prompts to tokens."""

import json
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
# Beside weights and KV: activations, graphs, and what the allocator keeps.
SPARE_BYTES = 12 * 2**30
# A run is not begun where less time is left than decoding so many times slower than memory allows
# takes, and prompts at so many tokens a second.
PATIENCE, SLOW_PREFILL = 2.0, 25_000


def run(report: Report) -> None:
    sizes = TINY if report.tiny else LLAMA_3_8B
    if report.compiling:
        sizes = {**sizes, "num_hidden_layers": 1}  # all layers have the same kernels
    began = time.monotonic()
    make_model(report, report.folder, sizes)
    report.line(f"random weights written in {time.monotonic() - began:.0f} s")
    serve(report, report.folder)


def invariance(report: Report) -> None:
    """What one request's tokens are given as log-probabilities, whatever is in its steps."""
    make_model(report, report.folder, TINY)
    others = 64 if report.gpu else 1
    drawn = torch.randint(0, 128, (1 + others, 40), generator=torch.Generator().manual_seed(2))
    prompts = [{"prompt_token_ids": row} for row in drawn.tolist()]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)

    def told(chunk: int, *batches: list[dict]) -> list[torch.Tensor]:
        llm = LLM(
            report.folder,
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
        texts.extend(answer.outputs[0].token_ids for answer in answers)
        return [
            torch.tensor([next(iter(step.values())).logprob for step in a.outputs[0].logprobs])
            for a in answers
        ]

    texts: list[list[int]] = []
    alone, again = told(64, prompts[:1], prompts[:1])
    (among,) = told(64, prompts)
    (chunked,) = told(16, prompts)
    # As on another worker: what was generated is part of what is computed at once.
    generated = prompts[0]["prompt_token_ids"] + texts[0][:3]
    resumed = told(64, [{"prompt_token_ids": generated}])[0][:5]
    cases = {
        "after a prefix hit": (again, alone),
        f"among {others} more": (among, alone),
        "in chunks": (chunked, alone),
        "after a resume": (resumed, alone[3:]),
    }
    for case, (actual, expected) in cases.items():
        if report.gpu:
            report.same(f"log-probabilities alone and {case}", actual, expected)
        else:  # a CPU's float32 products are torch's own
            report.close(f"log-probabilities alone and {case}", actual, expected, 1e-2)


def decoding(report: Report) -> None:
    """Steps as they are served, on a GPU graphs of several sizes and one ahead, beside steps by the
    reference, each waited for."""
    make_model(report, report.folder, TINY)
    count = 64 if report.gpu else 3
    drawn = torch.randint(0, 128, (count, 44), generator=torch.Generator().manual_seed(3)).tolist()
    # Of other lengths, and with other ends: batches come to be of every size.
    prompts = [{"prompt_token_ids": row[: 5 + 7 * i % 40]} for i, row in enumerate(drawn)]
    params = [
        SamplingParams(temperature=0, max_tokens=1 + i % 12, ignore_eos=True, logprobs=0)
        for i in range(count)
    ]

    def told(kernels: str, ahead: bool) -> list[list[tuple[int, float]]]:
        llm = LLM(
            report.folder,
            kv_cache_dtype="fp8_e4m3",
            max_model_len=64,
            max_num_seqs=max(2, count - 15),  # some wait
            num_blocks=4 * (1 + count),
            device=report.device.type,
            kernels=kernels,
            async_scheduling=ahead,
        )
        try:
            results = llm.generate(prompts, params, use_tqdm=False)
        finally:
            llm.close()
        steps = [result.outputs[0].logprobs for result in results]
        return [[(t, p.logprob) for step in one for t, p in step.items()] for one in steps]

    pairs = []
    for served, plain in zip(told("triton", True), told("reference", False), strict=True):
        for (token, value), (wanted, exact) in zip(served, plain, strict=True):
            pairs.append((value, exact))
            if token != wanted:
                break  # two that are as likely: what follows has nothing in common any more
    values, exact = torch.tensor(pairs).unbind(1)
    report.close(f"log-probabilities of {len(pairs)} served tokens", values, exact, 1e-2)
    asked = sum(p.max_tokens for p in params)
    report.check("most tokens are the reference's", len(pairs) > 0.7 * asked, f"{asked} in all")


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
    timed = report.gpu and not report.compiling
    if timed:
        # What matters most first: time may run out.
        runs = [(1, 1024, 512), (32, 1024, 512), (512, 1000, 1000)]
        runs += [(256, 1024, 512), (128, 1024, 512)]
        report.line(TARGETS)
    else:
        runs = [(1, 5, 3), (2, 4, 3)]
    once(llm, 1, 4, 2)
    for requests, before, after in runs:
        # All are there at once, and none ends before the others.
        floor = after * (read + requests * (before + after / 2) * token_bytes) / copy
        if timed and report.left_s < PATIENCE * floor + requests * before / SLOW_PREFILL:
            report.check(f"{requests} requests of {before}/{after}", False, "no time is left")
            continue
        seconds, told = once(llm, requests, before, after)
        rate = requests * after / seconds
        report.line(
            f"{requests} requests of {before}/{after} at a time: {rate:.0f} output "
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
