"""Exact-match accuracy of a checkpoint or an endpoint, on questions generated from a seed."""
