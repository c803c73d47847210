"""What a machine with an NVIDIA GPU says of Baton's kernels: right, and how fast."""
