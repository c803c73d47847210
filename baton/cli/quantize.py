"""`baton quantize`: write an FP8 checkpoint, in a published format, from an unquantized one."""

import argparse
from pathlib import Path

from common.errors import ConfigError

SCHEMES = {
    "fp8-static": "a scale for each matrix, one for its inputs from --calibration",
    "fp8-dynamic": "a scale for each row of a matrix and for each token",
    "fp8-block": "a scale for each 128 x 128 weights, and 128 columns of a token",
}


def main(argv: list[str]) -> int:
    """Writes the folder and prints what became of its size. Raises BatonError."""
    args = _parser().parse_args(argv)
    calibrated = args.scheme == "fp8-static" or args.kv_cache_dtype is not None
    if calibrated and args.calibration is None:
        asks = f"--scheme {args.scheme}" if args.kv_cache_dtype is None else "--kv-cache-dtype"
        raise ConfigError(
            f"{asks} needs --calibration FILE, with prompts like those that the model will be "
            'asked: one a line, or .jsonl with "text" or "messages"'
        )
    if not calibrated and args.calibration is not None:
        raise ConfigError(
            f"--calibration is of no use to {args.scheme}, whose scales are found as tokens come; "
            "leave it out, or choose --scheme fp8-static"
        )
    from common.engine.quantization.write import write_quantized  # loads torch

    calibration = None
    if calibrated:
        from common.engine.quantization.calibrate import calibrate, read_prompts

        prompts = read_prompts(args.calibration, args.model)
        calibration = calibrate(args.model, prompts, kv=args.kv_cache_dtype is not None)
    write_quantized(args.model, args.out, args.scheme, calibration)
    before, after = (_weight_bytes(folder) / 2**20 for folder in (args.model, args.out))
    print(f"{args.out}: {args.scheme}, {after:.1f} MiB of weights, {before:.1f} MiB before")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton quantize",
        description="Write an FP8 checkpoint from an unquantized one, for Baton, vLLM and "
        "transformers.",
        epilog="schemes:\n" + "\n".join(f"  {n:<12} {text}" for n, text in SCHEMES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder of an unquantized checkpoint")
    add("out", type=Path, metavar="OUT", help="new folder")
    add("--scheme", required=True, choices=SCHEMES, help="see below")
    add("--calibration", type=Path, metavar="FILE", help="prompts, one a line or .jsonl")
    add(
        "--kv-cache-dtype",
        choices=("fp8_e4m3",),
        help="calibrate static scales of the KV cache too, which is then served in FP8",
    )
    return parser


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
