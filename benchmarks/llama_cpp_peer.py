"""llama.cpp as an engine of cpu_peers.py: the checkpoint as a GGUF file, decoded in batches.

Runs where benchmarks/peers.sh --llama-cpp has built it. Its own loop: the high-level interface of
llama-cpp-python takes one sequence at a time.
"""

import json
import os
from pathlib import Path

import gguf
import llama_cpp as api
import numpy as np
import torch
from safetensors import safe_open

# Tokens of a batch, and of what is computed at a time.
BATCH_TOKENS = 2048
MICRO_BATCH_TOKENS = 512
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(folder: Path) -> Path:
    """The Llama checkpoint of a folder as a GGUF file beside it, if it is not there: matrices in
    bfloat16, norms in float32, no vocabulary."""
    path = folder / "model.gguf"
    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
            tensor, place = tensors.get_tensor(name), _place(name)
            if tensor.dim() == 1:
                writer.add_tensor(place, tensor.float().numpy())
                continue
            if "attn_q" in place or "attn_k" in place:
                tensor = _interleave(tensor, heads if "attn_q" in place else kv_heads)
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(place, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)
    return path


def _place(name: str) -> str:
    """A Hugging Face tensor's name in GGUF."""
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbours, Hugging Face the halves of a head."""
    out, width = weight.shape
    halves = weight.view(heads, 2, out // heads // 2, width)
    return halves.transpose(1, 2).reshape(out, width)


class LlamaCpp:
    """Greedy decoding of prompts of one length, in a context for each shape of the work."""

    def __init__(self, folder: Path) -> None:
        api.llama_backend_init()
        path = str(write_gguf(folder)).encode()
        self._model = api.llama_model_load_from_file(path, api.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {path.decode()}")
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._contexts: dict[tuple[int, int], api.llama_context_p] = {}

    def generate(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        requests, length = len(prompts), len(prompts[0])
        context = self._context(requests, length + count)
        api.llama_memory_clear(api.llama_get_memory(context), False)
        # (token, position, sequence, whether its logits are wanted)
        entries = [
            (token, position, sequence, position == length - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        chosen = [tokens[0] for tokens in self._run(context, entries, requests)]
        outputs = [[token] for token in chosen]
        for step in range(count - 1):
            entries = [(token, length + step, s, True) for s, token in enumerate(chosen)]
            chosen = [tokens[0] for tokens in self._run(context, entries, requests)]
            for output, token in zip(outputs, chosen, strict=True):
                output.append(token)
        return outputs

    def _run(
        self, context: "api.llama_context_p", entries: list[tuple], requests: int
    ) -> list[list[int]]:
        """The greedy tokens of the entries that want logits, by sequence."""
        chosen: list[list[int]] = [[] for _ in range(requests)]
        for first in range(0, len(entries), BATCH_TOKENS):
            part = entries[first : first + BATCH_TOKENS]
            batch = self._batch
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if status := api.llama_decode(context, batch):
                raise SystemExit(f"llama_decode gave {status}")
            for i, (_, _, sequence, wanted) in enumerate(part):
                if wanted:
                    row = api.llama_get_logits_ith(context, i)
                    logits = np.ctypeslib.as_array(row, (self._vocab,))
                    chosen[sequence].append(int(logits.argmax()))
        return chosen

    def _context(self, requests: int, tokens: int) -> "api.llama_context_p":
        """With room for so many sequences of so many tokens."""
        if (requests, tokens) not in self._contexts:
            params = api.llama_context_default_params()
            params.n_ctx = requests * -(-tokens // 256) * 256
            params.n_batch, params.n_ubatch = BATCH_TOKENS, MICRO_BATCH_TOKENS
            params.n_seq_max = requests
            params.n_threads = params.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
            self._contexts[requests, tokens] = api.llama_init_from_model(self._model, params)
        return self._contexts[requests, tokens]
