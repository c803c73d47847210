"""FP8 checkpoints: how they are published, read, made and multiplied."""
