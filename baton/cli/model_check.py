"""The doctor's check of a model folder: read without torch, no weight is loaded."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from baton.cli.checks import Finding
from baton.cli.locate import model_folder
from common.engine.config import ModelConfig
from common.errors import BatonError, CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth")
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
AGAIN = "fetch the folder again"


def check_model(given: str | None) -> Iterator[Finding]:
    """The folder exists, its config is one that Baton serves, its weights are whole."""
    try:
        folder = model_folder(given)
    except BatonError as error:
        yield Finding("model", "fail", str(error), "name a folder with --model, or BATON_MODEL")
        return
    try:
        config = ModelConfig.from_folder(folder)
    except BatonError as error:
        yield Finding("model", "fail", str(error), f"name another folder with --model, or {AGAIN}")
        return
    yield Finding(
        "model",
        "ok",
        f"{folder}: {config.architecture}, {config.num_layers} layers, "
        f"{config.max_position_embeddings} tokens of context",
    )
    yield _weights(folder)
    yield _tokenizer(folder)


def _weights(folder: Path) -> Finding:
    try:
        files = _weight_files(folder)
        total = sum(_whole_size(path) for path in files)
    except (CheckpointError, OSError) as error:
        return Finding("model weights", "fail", str(error), AGAIN)
    return Finding("model weights", "ok", f"{len(files)} file(s), {total / 2**20:.1f} MiB")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            named = json.loads(index.read_text())["weight_map"].values()
            files = [folder / name for name in sorted(set(named))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of safetensors files") from error
    else:
        files = [folder / SINGLE]
    for path in files:
        if not path.is_file():
            pickled = any(True for pattern in PICKLES for _ in folder.glob(pattern))
            why = "; pickle files are not loaded, convert them to safetensors" if pickled else ""
            raise CheckpointError(f"{path} is missing{why}")
    return files


def _whole_size(path: Path) -> int:
    """Bytes of a safetensors file. Raises CheckpointError when it is shorter than it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(LENGTH_BYTES)
        length = struct.unpack("<Q", head)[0] if len(head) == LENGTH_BYTES else 0
        if not 0 < length <= min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path} is not a safetensors file, or is truncated")
        try:
            header = json.loads(file.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
            wanted = LENGTH_BYTES + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path}: its header cannot be read") from error
    if size != wanted:
        raise CheckpointError(f"{path} has {size} bytes, its header says {wanted}: truncated?")
    return size


def _tokenizer(folder: Path) -> Finding:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return Finding(
            "model tokenizer",
            "warn",
            f"{path} is missing: only token ids can be served",
            "copy tokenizer.json of the model there",
        )
    try:
        from tokenizers import Tokenizer

        size = Tokenizer.from_file(str(path)).get_vocab_size()
    except ImportError:
        return Finding("model tokenizer", "warn", "not read: package tokenizers is missing", "")
    except Exception as error:  # tokenizers raises bare Exception for what it cannot read
        return Finding("model tokenizer", "fail", f"{path}: {error}", AGAIN)
    return Finding("model tokenizer", "ok", f"{size} tokens")
