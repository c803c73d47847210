"""Reads a checkpoint folder's safetensors files, and refuses what is not whole.

Headers are checked here, before any tensor is touched, so that a truncated download is named as
such. Pickle files are never opened.
"""

import json
import math
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from common.engine.json_file import read_json
from common.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
# The format's own limit on a header.
MAX_HEADER_BYTES = 100_000_000
CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a folder, by name. A context manager: files are open while it is.

    Raises CheckpointError, naming the file and the remedy, for missing, truncated, malformed or
    pickle-only folders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self.entries: dict[str, TensorEntry] = {}
        for file in self.files:
            for name, entry in _read_header(file).items():
                if name in self.entries:
                    raise CheckpointError(
                        f"{file}: tensor {name!r} is also in {self.entries[name].file.name}; "
                        "remove the file that does not belong to this model"
                    )
                self.entries[name] = entry
        self._check_index()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.clear()

    def check(self, shapes: dict[str, tuple[int, ...]], ignored: tuple[str, ...]) -> None:
        """The checkpoint must have exactly these tensors, and may have those whose names end in
        one of `ignored`."""
        for name, shape in shapes.items():
            entry = self.entries.get(name)
            if entry is None:
                raise CheckpointError(
                    f"{self.folder}: tensor {name!r} is in none of {len(self.files)} safetensors "
                    "files; is config.json of another model, or a file missing?"
                )
            if entry.shape != shape:
                raise CheckpointError(
                    f"{entry.file}: tensor {name!r} has shape {entry.shape}, config.json says "
                    f"{shape}; is this the folder of another model?"
                )
        for name, entry in self.entries.items():
            if name not in shapes and not name.endswith(ignored):
                raise CheckpointError(
                    f"{entry.file}: tensor {name!r} has no place in this architecture; "
                    "is config.json of another model?"
                )

    def read(self, name: str) -> torch.Tensor:
        """The tensor in the checkpoint's own dtype, on the CPU."""
        entry = self.entries[name]
        try:
            if entry.file not in self._open:
                self._open[entry.file] = safe_open(entry.file, framework="pt")
            return self._open[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} cannot be read ({error}); download the file again"
            ) from error

    def digest(self) -> bytes:
        """16 bytes that name these weights: a hash of every file's name and whole content."""
        total = blake2b(digest_size=16)
        for file in self.files:
            total.update(file.name.encode() + b"\0" + _file_digest(file))
        return total.digest()

    def _check_index(self) -> None:
        path = self.folder / INDEX
        if len(self.files) == 1 and self.files[0].name == SINGLE:
            return
        for name, file in read_json(path)["weight_map"].items():
            entry = self.entries.get(name)
            if entry is None or entry.file.name != file:
                raise CheckpointError(
                    f"{path}: says that {name!r} is in {file}, which does not hold it; "
                    "index and shards are of different downloads, fetch the folder again"
                )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise _no_weights(folder)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; download the file again")
    for name in weight_map.values():
        # Only plain names: an index must not lead out of the folder.
        plain = isinstance(name, str) and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: names the shard {name!r}; shards are *.safetensors in the same folder"
            )
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name}: missing, though {INDEX} names it; "
                "complete the download of this folder"
            )
    return sorted(folder / name for name in set(weight_map.values()))


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder / pickles[0]}: a pickle file, which can run code when loaded and is never "
            f"opened; convert the checkpoint to {SINGLE}"
        )
    return CheckpointError(
        f"{folder}: has neither {SINGLE} nor {INDEX}; complete the download of this folder"
    )


def _read_header(file: Path) -> dict[str, TensorEntry]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: {size} bytes, too short for its header; it is truncated or no "
                    "safetensors file, download it again"
                )
            raw = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: its header is not JSON ({error}); it is damaged, download it again"
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: its header is no JSON object; download it again")
    raw.pop("__metadata__", None)
    entries = {}
    for name, field in raw.items():
        entries[name], end = _entry(file, name, field)
        if end > size - 8 - length:
            raise CheckpointError(
                f"{file}: truncated: tensor {name!r} ends at byte {8 + length + end}, the file has "
                f"{size}; download it again"
            )
    return entries


def _entry(file: Path, name: str, field: Any) -> tuple[TensorEntry, int]:
    """A tensor's entry and the offset of its end in the data part."""
    try:
        dtype, shape = str(field["dtype"]), tuple(int(n) for n in field["shape"])
        start, end = (int(n) for n in field["data_offsets"])
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{file}: the header's entry of {name!r} is malformed; download the file again"
        ) from error
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{file}: tensor {name!r} is {dtype}; this version serves float32, bfloat16, float16 "
            "and FP8 e4m3 checkpoints, use the unquantized checkpoint of the model"
        )
    if min(shape, default=0) < 0 or end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{file}: tensor {name!r} of shape {shape} and dtype {dtype} has {end - start} bytes; "
            "the file is damaged, download it again"
        )
    return TensorEntry(file, shape, dtype), end


def _file_digest(file: Path) -> bytes:
    # Not against forgery: it tells checkpoints apart, at the speed of the disk.
    state = xxhash.xxh3_128()
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    try:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                state.update(view[:count])
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    return state.digest()
