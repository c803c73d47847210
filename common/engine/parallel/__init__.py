"""Tensor parallelism: the processes of one worker that compute every step together.

Rank 0 is the worker's own process, with scheduler, sampler and connectors. The other ranks are its
children: each holds a part of every matrix and runs the steps that rank 0 sends. The split is
Megatron-LM's (Shoeybi et al. 2019): Q, K, V, gate and up by rows, the matrices after them by
columns, and one sum over all ranks after each of the latter.
"""
