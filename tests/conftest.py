"""Triton kernels run here in its interpreter, on the CPU. It decides when a kernel is defined, and
torch and transformers define some: hence before anything is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
