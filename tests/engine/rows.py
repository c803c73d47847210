"""Sequences for the sampler, and its processors written down plainly, one row at a time."""

import math

from common.engine.sequence import EngineRequest, Sequence


def row(params, prompt=(0,), output=(), *, seed=0):
    """A sequence that came with `prompt` and has generated `output` since."""
    request = EngineRequest("r", list(prompt), params)
    return Sequence(request, [*prompt, *output], seed)


def tokens_of(sampled):
    assert all(result.error is None for result in sampled)
    return [result.token for result in sampled]


def processed(logits, params, prompt, output, eos=()):
    """A row's logits after all that its parameters ask for: floats, loops, definitions."""
    logits = list(logits)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in range(len(logits)):
        if token in prompt or token in output:
            if logits[token] > 0:
                logits[token] /= params.repetition_penalty
            else:
                logits[token] *= params.repetition_penalty
        logits[token] -= params.frequency_penalty * list(output).count(token)
        logits[token] -= params.presence_penalty * (token in output)
    for word in params.bad_words:
        before, last = list(word[:-1]), word[-1]
        if not before or list(output)[-len(before) :] == before:
            logits[last] = -math.inf
    if len(output) < params.min_tokens:
        for token in (*(() if params.ignore_eos else eos), *params.stop_token_ids):
            logits[token] = -math.inf
    return logits
