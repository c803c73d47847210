"""Triton kernels run here in its interpreter, on the CPU; it decides when a kernel is defined."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
