"""A matrix as its checkpoint means it, whatever the format it was published in."""

from dataclasses import dataclass, replace

import torch

from common.engine.quantization.scheme import BLOCK, Activation
from common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Weight:
    """What a backend packs into a Linear (`Ops.linear`).

    values       [out, in], a float dtype, or float8_e4m3fn (never NaN) with what follows
    scale        None, or float32, positive: [out, 1] for each row, or [out / 128, in / 128]
                 rounded up for each block; the matrix is values * scale. A scale for the whole
                 tensor is repeated for each row when read, so that fused matrices need no case of
                 their own
    activation   None for float values
    input_scale  float32 [], for Activation.TENSOR
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None
    activation: Activation | None = None
    input_scale: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Weight":
        """The same on another device."""
        moved = {
            name: tensor.to(device)
            for name in ("values", "scale", "input_scale")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)


def cut(weight: Weight, name: str, rows: range | None, columns: range | None) -> Weight:
    """These rows and columns of a matrix, None for all of them.

    Raises ConfigError, with the name, for a range that cuts through a block with a scale.
    """
    out, width = weight.values.shape
    rows = range(out) if rows is None else rows
    columns = range(width) if columns is None else columns
    values = weight.values[rows.start : rows.stop, columns.start : columns.stop]
    if values.numel() < weight.values.numel():
        values = values.clone()  # a view would keep the whole matrix in memory
    scale = weight.scale
    if weight.activation is Activation.GROUP:
        if not (_whole_blocks(rows, out) and _whole_blocks(columns, width)):
            raise ConfigError(
                f"{name}: rows {rows.start} to {rows.stop} and columns {columns.start} to "
                f"{columns.stop} of {out} x {width} cut through blocks of {BLOCK} that have one "
                "scale; set tensor_parallel lower, or quantize by rows (fp8)"
            )
        tall, wide = (slice(r.start // BLOCK, -(-r.stop // BLOCK)) for r in (rows, columns))
        scale = scale[tall, wide]
    elif scale is not None:
        scale = scale[rows.start : rows.stop]
    return replace(weight, values=values, scale=scale)


def _whole_blocks(wanted: range, size: int) -> bool:
    return wanted.start % BLOCK == 0 and (wanted.stop % BLOCK == 0 or wanted.stop == size)


def fuse(parts: list[Weight]) -> Weight | None:
    """The matrices as one, stacked along their rows; None where one Linear cannot have them: some
    are quantized and others not, or differently, or a part's last block scale is not whole.

    Their static input scales become one, the largest, as the field does: the input is quantized
    once for all of them.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.activation is not first.activation for part in parts):
        return None
    values = torch.cat([part.values for part in parts])
    if first.scale is None:
        return Weight(values)
    if first.activation is Activation.GROUP and any(len(p.values) % BLOCK for p in parts[:-1]):
        return None
    scale = torch.cat([part.scale for part in parts])
    if first.activation is not Activation.TENSOR:
        return Weight(values, scale, first.activation)
    input_scale = torch.stack([part.input_scale for part in parts]).amax()
    return Weight(values, scale, first.activation, input_scale)
