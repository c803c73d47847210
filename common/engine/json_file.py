"""A checkpoint's JSON files, read field by field with checks that name file and field."""

import json
from pathlib import Path
from typing import Any

from common.errors import CheckpointError

# Real configurations are a few KiB; a bigger file is not one.
MAX_JSON_BYTES = 4 * 2**20


class JsonReader:
    """One JSON object of a file, read field by field with checks that name file and field."""

    def __init__(self, path: Path, raw: dict[str, Any] | None = None, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix
        self.raw = read_json(path) if raw is None else raw

    def fail(self, name: str, want: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {self.prefix}{name} is {self.raw.get(name)!r}, must be {want}"
        )

    def integer(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
            raise self.fail(name, f"an integer of at least {low}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e12:
            raise self.fail(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def section(self, name: str) -> "JsonReader | None":
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(name, "an object")
        return JsonReader(self.path, value, f"{self.prefix}{name}.")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming it."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES and not path.name.endswith(".index.json"):
            raise CheckpointError(f"{path}: {size} bytes; a configuration is a few KiB")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); is the download of this folder complete?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not valid JSON ({error}); download the file again"
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds a {type(raw).__name__}")
    return raw
