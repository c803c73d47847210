"""Text around the engine: incremental decoding, stop strings, chat templates. Imports no torch."""
