"""The kernels around attention."""

from tools.aot import AotCase

CASES: list[AotCase] = []
