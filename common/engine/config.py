"""What a model is (`config.json`) and how an engine runs it. Imports no torch: the gateway uses it.

Every refusal names the file or the setting, the value found, and what to do about it.
"""

from dataclasses import dataclass
from pathlib import Path

from common.engine.json_file import JsonReader
from common.engine.quantization.scheme import SCHEMES, Quantization, parse_quantization
from common.errors import CheckpointError, ConfigError
from common.kv.layout import MAX_BLOCK_SIZE

DTYPES = ("auto", "float32", "bfloat16")
KV_DTYPES = ("auto", "float32", "bf16", "fp8_e4m3")
KERNELS = ("auto", "reference", "cpu", "triton")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding settings. `factor` and what follows matter to the scaled kinds only.

    kind                default | linear | llama3 | yarn
    original_max_len    positions the model was trained on before scaling, tokens
    attention_factor    yarn: multiplies cos and sin; None: derived from factor and the mscales
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dense decoder as its `config.json` and `generation_config.json` describe it.

    architecture   class name in `architectures`, e.g. LlamaForCausalLM
    layer_windows  for each layer the number of most recent tokens it attends to (the current one
                   included), None for all
    eos_token_ids  tokens that end a sequence, of both files
    torch_dtype    dtype the checkpoint names: float32, bfloat16 or float16
    quantization   which matrices are FP8, and how; None: none
    """

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    layer_windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    torch_dtype: str
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None = None

    @classmethod
    def from_folder(cls, path: Path | str) -> "ModelConfig":
        """Reads and checks `config.json` (and `generation_config.json` where there is one).

        Raises CheckpointError for a folder that cannot be served.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: no such folder; give the path of a local Hugging Face model folder "
                "(with config.json and *.safetensors)"
            )
        return _parse(JsonReader(folder / "config.json"), _generation_eos(folder))

    @property
    def num_parameters(self) -> int:
        """Weights of the matrices; norms and biases are left out."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * (attention + mlp) + embeddings


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture fixes beyond its config.json."""

    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "LlamaForCausalLM": _Family(),
    "MistralForCausalLM": _Family(),
    "Qwen2ForCausalLM": _Family(qkv_bias=True),
    "Qwen3ForCausalLM": _Family(qk_norm=True),
}


def _parse(reader: JsonReader, generation_eos: tuple[int, ...]) -> ModelConfig:
    architecture = _architecture(reader)
    family = FAMILIES[architecture]
    if reader.raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise reader.fail("hidden_act", "silu, the one activation these models are served with")
    heads = reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", heads)
    hidden = reader.integer("hidden_size")
    if heads % kv_heads:
        raise reader.fail("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if reader.raw.get("head_dim") is None and hidden % heads:
        raise reader.fail("hidden_size", f"a multiple of num_attention_heads ({heads})")
    head_dim = reader.integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise reader.fail("head_dim", "even: rotary embeddings turn pairs")
    max_positions = reader.integer("max_position_embeddings")
    layers = reader.integer("num_hidden_layers")
    attention_bias = reader.flag("attention_bias")
    own_eos = _token_ids(reader, "eos_token_id")
    return ModelConfig(
        architecture=architecture,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        vocab_size=reader.integer("vocab_size"),
        max_position_embeddings=max_positions,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=_rope(reader, max_positions),
        layer_windows=_windows(reader, architecture, layers),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias and not family.qkv_bias,
        mlp_bias=reader.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        torch_dtype=_dtype(reader),
        eos_token_ids=tuple(dict.fromkeys(own_eos + generation_eos)),
        quantization=parse_quantization(reader),
    )


def _architecture(reader: JsonReader) -> str:
    names = reader.raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(FAMILIES):
        raise reader.fail("architectures", f"one of {', '.join(sorted(FAMILIES))}")
    return names[0]


def _dtype(reader: JsonReader) -> str:
    # transformers 5 writes `dtype`, earlier versions `torch_dtype`.
    name = "dtype" if reader.raw.get("dtype") is not None else "torch_dtype"
    value = reader.raw.get(name)
    if value is None:
        return "float32"
    if value not in ("float32", "bfloat16", "float16"):
        raise reader.fail(name, "float32, bfloat16 or float16")
    return value


def _rope(reader: JsonReader, max_positions: int) -> RopeConfig:
    # transformers 5 has one section with rope_theta in it, earlier versions two fields.
    section = reader.section("rope_parameters") or reader.section("rope_scaling")
    theta = reader.number("rope_theta", 10000.0)
    if reader.raw.get("partial_rotary_factor", 1.0) not in (1, None):
        raise reader.fail("partial_rotary_factor", "1")
    if section is None:
        return RopeConfig(theta=theta)
    theta = section.number("rope_theta", theta)
    kind = section.raw.get("rope_type", section.raw.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise CheckpointError(
            f"{reader.path}: {section.prefix}rope_type is {kind!r}; "
            f"this version serves {', '.join(ROPE_KINDS)}"
        )
    if section.raw.get("partial_rotary_factor", 1.0) not in (1, None):
        raise section.fail("partial_rotary_factor", "1")
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = section.number("factor")
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=factor)
    original = section.integer("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
        if low >= high:
            raise section.fail("low_freq_factor", f"under high_freq_factor ({high:g})")
        return RopeConfig(theta, kind, factor, original, low_freq_factor=low, high_freq_factor=high)
    return _yarn(section, theta, factor, original)


def _yarn(section: JsonReader, theta: float, factor: float, original: int) -> RopeConfig:
    attention_factor = section.raw.get("attention_factor")
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_len=original,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        attention_factor=None if attention_factor is None else section.number("attention_factor"),
        mscale=section.number("mscale", 0.0),
        mscale_all_dim=section.number("mscale_all_dim", 0.0),
        truncate=section.flag("truncate", True),
    )


def _windows(reader: JsonReader, architecture: str, layers: int) -> tuple[int | None, ...]:
    none: tuple[int | None, ...] = (None,) * layers
    if reader.raw.get("sliding_window") is None or architecture == "LlamaForCausalLM":
        return none
    if architecture.startswith("Qwen") and not reader.flag("use_sliding_window"):
        return none
    window = reader.integer("sliding_window")
    kinds = reader.raw.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        named = isinstance(kinds, list) and all(kind in known for kind in kinds)
        if not named or len(kinds) != layers:
            raise reader.fail("layer_types", f"a list of {layers} of {', '.join(known)}")
        return tuple(window if kind == known[1] else None for kind in kinds)
    if architecture.startswith("Qwen"):
        first = reader.integer("max_window_layers", layers, low=0)
        return tuple(window if layer >= first else None for layer in range(layers))
    return (window,) * layers


def _token_ids(reader: JsonReader, name: str) -> tuple[int, ...]:
    value = reader.raw.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise reader.fail(name, "a token id or a list of token ids")
    return tuple(ids)


def _generation_eos(folder: Path) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    return _token_ids(JsonReader(path), "eos_token_id") if path.exists() else ()


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one engine runs. Frozen; what is discovered at start is the runner's.

    model                   folder of the checkpoint
    dtype                   auto | float32 | bfloat16: what the model computes in. auto on a CPU is
                            float32 when the weights fit in 1 GiB so, else bfloat16
    quantization            None, or fp8 | fp8-block: quantizes the matrices of an unquantized
                            checkpoint while it is loaded. fp8: a scale for each row and each token;
                            fp8-block: for 128 x 128 weights and 128 columns of a token. The head
                            and the embeddings stay as they are
    kv_dtype                auto | float32 | bf16 | fp8_e4m3: what the KV cache holds; auto: what a
                            quantized checkpoint asks for, else dtype
    block_size              tokens in a KV block
    max_model_len           most tokens of one sequence; None: the model's own limit, or what the
                            KV cache holds where that is less
    num_blocks              KV blocks, the null block among them; None: from kv_cache_bytes
    kv_cache_bytes          memory for KV when num_blocks is None; never more blocks than
                            max_num_seqs sequences of max_model_len need
    max_num_seqs            sequences in one step
    max_num_batched_tokens  tokens in one step: longer prompts are computed in chunks
    max_waiting             requests that may wait; more are refused
    prefix_caching          reuse the KV of equal prefixes
    device                  a torch device
    kernels                 auto | reference | cpu | triton: which implementation of the model's
                            operations; auto takes the fastest that is exact on this machine
    async_scheduling        prepare the next step while this one runs, where no request's penalties
                            need its tokens first; None: on a GPU
    threads                 torch threads; None: torch's own choice
    tensor_parallel         processes that compute each step together, the engine's own among them;
                            they share the threads
    batch_invariant         what is computed for a token depends, to the bit, on the tokens before
                            it alone: not on the rest of the step, nor on how prompts were cut;
                            slower
    rotate_qk               multiply Q and K by a Hadamard matrix: FP8 KV of a model whose K has
                            outliers is then more exact. Head sizes that are a power of two
    fp8_attention           attention of prompts to an fp8_e4m3 KV cache multiplies in e4m3: twice
                            the rate of a GPU's products, less exact. Heads of 32 elements or more;
                            on a GPU, or emulated by kernels=reference
    private_kv              ranks hold their KV heads in memory of their own, as they do on GPUs,
                            also on a CPU, where sharing one cache is faster: for tests

    Raises ConfigError, naming the setting, for a value that cannot work.
    """

    model: Path
    dtype: str = "auto"
    quantization: str | None = None
    kv_dtype: str = "auto"
    block_size: int = 16
    max_model_len: int | None = None
    num_blocks: int | None = None
    kv_cache_bytes: int = 512 * 2**20
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting: int = 256
    prefix_caching: bool = True
    device: str = "cpu"
    kernels: str = "auto"
    async_scheduling: bool | None = None
    threads: int | None = None
    tensor_parallel: int = 1
    batch_invariant: bool = False
    rotate_qk: bool = False
    fp8_attention: bool = False
    private_kv: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", Path(self.model))
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        if self.quantization is not None:
            _check_choice("quantization", self.quantization, tuple(SCHEMES))
        _check_choice("kernels", self.kernels, KERNELS)
        _check_int("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        _check_int("kv_cache_bytes", self.kv_cache_bytes, 1, 2**50)
        _check_int("max_num_seqs", self.max_num_seqs, 1, 2**16)
        _check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**20)
        _check_int("max_waiting", self.max_waiting, 0, 2**20)
        if self.max_model_len is not None:
            _check_int("max_model_len", self.max_model_len, 1, 2**31 - 1)
        if self.num_blocks is not None:
            _check_int("num_blocks", self.num_blocks, 2, 2**31 - 1)
        if self.threads is not None:
            _check_int("threads", self.threads, 1, 1024)
        _check_int("tensor_parallel", self.tensor_parallel, 1, 64)
        if self.async_scheduling not in (None, True, False):
            raise ConfigError(
                f"async_scheduling is {self.async_scheduling!r}; set it to true or false"
            )
        if not isinstance(self.prefix_caching, bool):
            raise ConfigError(f"prefix_caching is {self.prefix_caching!r}; set it to true or false")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; set it to one of {', '.join(choices)}")


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; set it to an integer from {low} to {high}")
