"""What each rank holds of a model. Arithmetic only."""

from dataclasses import dataclass

from common.engine.config import ModelConfig
from common.errors import ConfigError

# Shares of an MLP that is a multiple of this begin at one: scales of quantized blocks cover as
# many columns.
MLP_UNIT = 128


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model, as half-open ranges.

    num_heads     query heads
    kv_heads      KV heads that these attend to
    kv_is_shared  there are fewer KV heads than ranks: several ranks attend to the same one
    writes_kv     False on a rank whose KV head another one has too, which is the one to write it
                  into a cache that they share, or to give it out of a cache of its own
    q_rows        rows of Q's matrix, columns of the output projection's
    kv_rows       rows of K's and of V's matrix
    mlp           rows of the gate's and up's matrices, columns of down's
    vocab         rows of the head; none or fewer on the last ranks where it cannot be even
    """

    rank: int
    size: int
    num_heads: int
    kv_heads: range
    kv_is_shared: bool
    writes_kv: bool
    q_rows: range
    kv_rows: range
    mlp: range
    vocab: range

    @classmethod
    def of(cls, model: ModelConfig, rank: int, size: int) -> "Shard":
        """Raises ConfigError for more ranks than the heads or the MLP can be shared by."""
        _check(model, size)
        dim, group = model.head_dim, model.num_heads // model.num_kv_heads
        heads = range(model.num_heads * rank // size, model.num_heads * (rank + 1) // size)
        kv_heads = range(heads.start // group, (heads.stop - 1) // group + 1)
        unit = MLP_UNIT if model.intermediate_size % MLP_UNIT == 0 else 1
        units = max(model.intermediate_size // unit, 1)
        if units < size:
            unit, units = 1, model.intermediate_size
        column = -(-model.vocab_size // size)
        return cls(
            rank=rank,
            size=size,
            num_heads=len(heads),
            kv_heads=kv_heads,
            kv_is_shared=size > model.num_kv_heads,
            writes_kv=heads.start % group == 0,
            q_rows=range(heads.start * dim, heads.stop * dim),
            kv_rows=range(kv_heads.start * dim, kv_heads.stop * dim),
            mlp=range(units * rank // size * unit, units * (rank + 1) // size * unit),
            vocab=range(
                min(column * rank, model.vocab_size), min(column * (rank + 1), model.vocab_size)
            ),
        )


def _check(model: ModelConfig, size: int) -> None:
    kv_heads = model.num_kv_heads
    if model.num_heads % size or (kv_heads % size and size % kv_heads):
        fitting = [
            str(n)
            for n in range(1, model.num_heads + 1)
            if model.num_heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
        ]
        raise ConfigError(
            f"tensor_parallel is {size}, which does not divide the model's {model.num_heads} heads "
            f"and {kv_heads} KV heads; set it to one of {', '.join(fitting)}"
        )
    if model.intermediate_size < size:
        raise ConfigError(
            f"tensor_parallel is {size}, over the MLP's intermediate_size "
            f"{model.intermediate_size}; set it to that or less"
        )
