"""On a GPU nothing is compiled while somebody waits: steps ask for the kernels of the warm-up."""

import os
import subprocess
import sys

SCHEMES = ("none", "fp8", "fp8-block")


def test_no_step_asks_for_a_kernel_that_the_warm_up_did_not_compile():
    # A process of its own: in this one Triton interprets.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launches", *SCHEMES],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    told = run.stdout.splitlines()
    assert told[1::2] == ["later: {}"] * len(SCHEMES)
    for scheme, warm in zip(SCHEMES, told[::2], strict=True):
        # The whole step was recorded, sampling too.
        for kernel in ("decode", "merge", "prefill", "write_kv", "rms_norm", "silu_mul", "pick"):
            assert f"{kernel}_kernel" in warm
        assert ("matmul_kernel" in warm) == (scheme != "none")
