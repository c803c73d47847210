"""The request before all others, of workers and of `LLM`: what is lazy or broken shows here."""

from common.engine.sampling_params import SamplingParams
from common.engine.sequence import EngineRequest

TOKENS = 32
# A tenant of its own: its blocks are found by nobody.
TENANT = "\x00warm-up"


def warm_up_request(max_model_len: int, *, prefill_only: bool = False) -> EngineRequest:
    """A chunk and, unless `prefill_only`, a decode step: between them they run, and so compile or
    find on disk, every kernel of the model.

    max_model_len  most tokens of a sequence, of the engine that is to run it
    """
    count = max(1, min(TOKENS, max_model_len - 2))
    return EngineRequest(
        request_id="warm-up",
        prompt_token_ids=[0] * count,
        params=SamplingParams(
            temperature=0.0, max_tokens=max(1, min(2, max_model_len - count)), ignore_eos=True
        ),
        tenant=TENANT,
        prefill_tokens=count if prefill_only else None,
    )
