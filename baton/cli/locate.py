"""Where things are on this machine: the default model, the source checkout, the default URL."""

import os
import sys
from pathlib import Path

import baton
from common.errors import ConfigError

MODEL_VARIABLE = "BATON_MODEL"
URL_VARIABLE = "BATON_URL"
DEFAULT_MODEL = "baton-tiny"
DEFAULT_URL = "http://127.0.0.1:8000"


def checkout() -> Path:
    """The folder that holds the `baton` package: the repository's root in a checkout."""
    return Path(baton.__file__).resolve().parent.parent


def model_folder(given: str | None) -> Path:
    """`given`, else BATON_MODEL, else the bundled model. Raises ConfigError when there is none."""
    named = given or os.environ.get(MODEL_VARIABLE)
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                f"model folder {folder} does not exist; --model (or {MODEL_VARIABLE}) takes a "
                "local folder with config.json and safetensors files"
            )
        return folder.resolve()
    for folder in bundled_folders():
        if (folder / "config.json").is_file():
            return folder
    tried = ", ".join(map(str, bundled_folders()))
    raise ConfigError(f"no bundled model in {tried}; name a model folder with --model")


def bundled_folders() -> tuple[Path, ...]:
    """Where the bundled model may be: a checkout, an installation, a container image."""
    return (
        checkout() / "models" / DEFAULT_MODEL,
        Path(sys.prefix) / "share" / "baton" / "models" / DEFAULT_MODEL,
        Path("/models") / DEFAULT_MODEL,
    )


def endpoint(given: str | None) -> str:
    """`given`, else BATON_URL, else the port of `baton up`; without /v1 and the last slash."""
    url = (given or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url {url!r} does not start with http:// or https://")
    return url.removesuffix("/v1")
