"""transformers' continuous batching on a model of the shape that `serving` serves.

Its weights and KV are bf16: the FP8 of `serving` needs packages beside transformers. What goes
wrong in here is told, and is no failure of Baton's.
"""

import time

import torch

from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.serving import LLAMA_3_8B, TINY

# No larger run follows one that took longer: the section's time has to do for loading too.
PATIENCE_S = 8.0


def run(report: Report) -> None:
    try:
        import transformers
    except ImportError:
        report.line("transformers is not installed: nothing to compare with")
        return
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        report.line(f"transformers {transformers.__version__} has no continuous batching")
        return
    kind = "bf16" if report.gpu else "float32"
    report.line(f"transformers {transformers.__version__}, {kind} weights and KV")
    try:
        compare(report)
    except Exception as error:  # a version that has changed, a package that it misses
        report.line(f"it did not run: {type(error).__name__}: {error}")


def compare(report: Report) -> None:
    sizes = TINY if report.tiny else LLAMA_3_8B
    began = time.monotonic()
    model = make_model(report, sizes)
    report.line(f"random weights made in {time.monotonic() - began:.0f} s")
    runs = ((32, 1024, 512), (128, 1024, 512)) if report.gpu else ((1, 5, 3), (2, 4, 3))
    for requests, before, after in runs:
        seconds, told = once(report, model, requests, before, after)
        report.line(
            f"{requests} requests of {before}/{after}: {told / seconds:.0f} output tokens/s in "
            f"{seconds:.1f} s"
        )
        if told != requests * after:
            report.line(f"   {told} tokens came instead of {requests * after}")
        if seconds > PATIENCE_S:
            report.line("   larger runs would take too long")
            break


def make_model(report: Report, sizes: dict[str, float]) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**sizes, rms_norm_eps=1e-5, tie_word_embeddings=False)
    dtype = torch.bfloat16 if report.gpu else torch.float32
    with report.device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def once(
    report: Report, model: torch.nn.Module, requests: int, before: int, after: int
) -> tuple[float, int]:
    """Seconds from the first request's coming to the last one's end, and the tokens that came.
    Graphs are captured before."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    drawn = torch.randint(
        0, model.config.vocab_size, (requests, before), generator=torch.Generator().manual_seed(1)
    )
    # It sizes a GPU's cache itself; a CPU's would take minutes.
    few = {} if report.gpu else {"num_blocks": 8, "max_batch_tokens": 64}
    answers = model.generate_batch(
        inputs=drawn.tolist(),
        generation_config=GenerationConfig(
            max_new_tokens=after, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(**few),
        progress_bar=False,
    ).values()
    if not answers:
        raise RuntimeError("no request was answered")
    seconds = max(a.lifespan[1] for a in answers) - min(a.created_time for a in answers)
    return seconds, sum(len(a.generated_tokens) for a in answers)
