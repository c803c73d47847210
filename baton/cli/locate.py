"""Where things are on this machine: the default model, the source checkout, the default URL."""

import os
import sys
from pathlib import Path

import baton
from common.errors import ConfigError

MODEL_VARIABLE = "BATON_MODEL"
URL_VARIABLE = "BATON_URL"
# The second one is where OpenAI's own clients look.
KEY_VARIABLES = ("BATON_API_KEY", "OPENAI_API_KEY")
KEY_HELP = f"key of the endpoint (default: {', then '.join(KEY_VARIABLES)})"
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


def api_key(given: str | None) -> str | None:
    """`given`, else BATON_API_KEY, else OPENAI_API_KEY, else None. Raises ConfigError for what no
    header can carry."""
    found = (given, *map(os.environ.get, KEY_VARIABLES))
    key = next((text.strip() for text in found if text), None)
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            "the API key holds spaces or characters that are not printable ASCII; see --api-key "
            f"and {' and '.join(KEY_VARIABLES)}"
        )
    return key


def key_headers(key: str | None) -> dict[str, str]:
    """What a request to an endpoint says of its sender."""
    return {"Authorization": f"Bearer {key}"} if key else {}
