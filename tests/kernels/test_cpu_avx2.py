"""The kernels as a CPU without AVX-512 has them: compiled for one in a process of its own."""

import os
import subprocess
import sys

from tests.support.mesh import ROOT

# Of a Haswell, the oldest CPU that the kernels run on; what the name stands for and no more.
CPU = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2"}
PARTS = (
    "tests/kernels/test_cpu_linear.py::test_the_bits_of_a_compiled_row_depend_on_that_row_alone",
    "tests/kernels/test_cpu_linear.py::test_every_candidate_multiplies_as_float64",
    "tests/kernels/test_cpu_linear.py::test_a_gated_product_is_bitwise_the_product_and_silu_mul_of_it",
    "tests/kernels/test_cpu_fp8.py::test_every_weight_byte_is_multiplied_as_its_value",
    "tests/kernels/test_cpu_attention.py::test_any_head_size[bf16-96]",
    "tests/kernels/test_cpu_attention.py::test_a_window_hides_what_is_older[17]",
    "tests/engine/test_tapes.py::test_recorded_steps_are_bitwise_those_that_run_kernel_by_kernel"
    "[bfloat16]",
)
NO_512 = """
import sys, pytest
from common.engine.kernels.cpu import e4m3, tiles
assert not tiles.HAS_BFLOAT16 and not e4m3.NATIVE
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_kernels_compiled_for_avx2_pass_their_tests(tmp_path):
    env = {**os.environ, **CPU, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "2"}
    options = ("-q", "-x", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-c", NO_512, *options, *PARTS],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # They were compiled here, not found where this machine's own are.
    assert list(tmp_path.glob("baton-*/kernels-*/**/*.nbc"))
