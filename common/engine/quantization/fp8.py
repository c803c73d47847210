"""FP8 e4m3 arithmetic in torch: to the format, from it, and the scales that go with it.

e4m3fn (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"): sign, 4 bits of exponent with
bias 7, 3 of mantissa; the largest value is 448, there are no infinities. Encoding rounds to the
nearest, ties to even, and saturates. NaN stays NaN: the sampler must see it.
"""

import torch
import torch.nn.functional as F

from common.engine.quantization.scheme import BLOCK, Activation, Scheme, WeightScale
from common.engine.weight import Weight

FP8_MAX = 448.0
FP8 = torch.float8_e4m3fn


def has_nan(values: torch.Tensor) -> bool:
    """Whether one of these e4m3 values is NaN."""
    return values.numel() > 0 and (values.view(torch.uint8) & 0x7F).amax().item() == 0x7F


def decode(values: torch.Tensor) -> torch.Tensor:
    """e4m3 values, none NaN -> float32, exactly."""
    return decode_256th(values).mul_(256)


def decode_256th(values: torch.Tensor) -> torch.Tensor:
    """e4m3 values, none NaN -> a 256th of each, float32, for who multiplies by a scale anyway.

    Shifted by 7 and with the copied sign bit cleared, e4m3 is a float16 of 2**-8 the value: the
    biases are 7 and 15. torch's own cast takes ten times as long on a CPU.
    """
    half = values.view(torch.int8).to(torch.int16).mul_(128).bitwise_and_(-0x4001)
    return half.view(torch.float16).float()


def round_to_fp8(x: torch.Tensor) -> torch.Tensor:
    """x float32, at most 448 in size or NaN -> the nearest e4m3 values, as float32.

    Where e4m3 values are `step` apart, adding and subtracting 1.5 * 2**23 * step rounds to them:
    float32 numbers of that size are `step` apart. Three times as fast as casting there and back.
    """
    # Between 2**e and 2**(e+1) the step is 2**(e-3), under 2**-6 it is 2**-9.
    exponent = (x.view(torch.int32) & 0x7F800000).clamp_(min=(127 - 6) << 23)
    magic = exponent.add_(20 << 23).bitwise_or_(0x400000).view(torch.float32)
    return (x + magic).sub_(magic)


def quotient(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale, saturated to e4m3's range, ready to be rounded. Zeros may have the scale 0."""
    divided = x / torch.where(scale == 0, 1.0, scale)
    # The clamp is also for quotients that round to over 448: torch's cast makes those NaN.
    return divided.clamp_(-FP8_MAX, FP8_MAX)


def finite(x: torch.Tensor) -> torch.Tensor:
    """x as float32 with infinities saturated, so that no scale is infinite."""
    limit = torch.finfo(torch.float32).max
    return x.float().clamp(-limit, limit)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., d] -> e4m3 values as float32 [..., d] and scales float32 [..., 1]: amax / 448."""
    wide = finite(x)
    scale = wide.abs().amax(-1, keepdim=True) / FP8_MAX
    return round_to_fp8(quotient(wide, scale)), scale


def quantize_input(
    x: torch.Tensor, activation: Activation, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, in] -> e4m3 values as float32 and float32 scales, as `activation` says.

    The values are [n, in] and the scales [n, 1] or [], or for groups [n, g, 128] and [n, g, 1] with
    the last group padded with zeros.
    """
    if activation is Activation.GROUP:
        return quantize_rows(_grouped(x))
    if activation is Activation.TOKEN:
        return quantize_rows(x)
    if input_scale is None:
        raise ValueError("a static activation needs its scale")
    return round_to_fp8(quotient(finite(x), input_scale)), input_scale


def _grouped(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def quantize_weight(weight: torch.Tensor, scheme: Scheme) -> Weight:
    """A float matrix [out, in] as the scheme has it; rows and blocks of zeros get the scale 1.

    Not for static activations: their scales come from calibration.
    """
    if scheme.weight is WeightScale.BLOCK:
        return _quantize_blocks(weight, scheme)
    wide = finite(weight)
    over = -1 if scheme.weight is WeightScale.CHANNEL else (0, 1)
    scale = _positive(wide.abs().amax(over, keepdim=True) / FP8_MAX)
    values = quotient(wide, scale).to(FP8)
    return Weight(values, scale.expand(len(weight), 1).contiguous(), scheme.activation)


def _quantize_blocks(weight: torch.Tensor, scheme: Scheme) -> Weight:
    rows, columns = weight.shape
    padded = F.pad(finite(weight), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [r, 128, c, 128]
    scale = _positive(blocks.abs().amax((1, 3), keepdim=True) / FP8_MAX)
    values = quotient(blocks, scale).to(FP8).flatten(2, 3).flatten(0, 1)
    return Weight(values[:rows, :columns].contiguous(), scale[:, 0, :, 0], scheme.activation)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 1.0, scale)


def spread(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Block scales [rows / 128, columns / 128] -> [rows, columns]."""
    tall = scale.repeat_interleave(BLOCK, 0)[:rows]
    return tall.repeat_interleave(BLOCK, 1)[:, :columns]
