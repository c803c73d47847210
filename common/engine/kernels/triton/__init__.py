"""Kernels in Triton: one file a kernel, each a launcher with plain tensor arguments."""
