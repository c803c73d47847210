"""Write docs/configuration.md from the services' settings; with --check, fail when it is stale."""

import argparse
import sys
from pathlib import Path

from pydantic import BaseModel

from services.decode.config import DecodeConfig
from services.gateway.config import GatewayConfig
from services.kvstore.config import KVStoreConfig
from services.prefill.config import PrefillConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
SERVICES: dict[str, type[BaseModel]] = {
    "gateway": GatewayConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
    "kvstore": KVStoreConfig,
}
HEAD = """# Configuration

Every service takes flags; each flag can also be set by an environment variable, `--some-flag` by
`BATON_SOME_FLAG`. A flag wins over its variable, an empty variable counts as unset. `baton up`
passes its own flags on; `baton serve ROLE --help` prints the same as this page, which
`python tools/config_docs.py` writes.
"""


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for role, model in SERVICES.items():
        parts.append(
            f"\n## {role}\n\n`baton serve {role}`\n\n| flag | default | what |\n|---|---|---|\n"
        )
        for name, field in model.model_fields.items():
            if field.description is None:
                continue
            default = "" if field.default in (None, "") else f"`{field.default}`"
            text = field.description.replace("|", "\\|")
            parts.append(f"| `--{name.replace('_', '-')}` | {default} | {text} |\n")
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(render())
    elif not PAGE.exists() or PAGE.read_text() != render():
        sys.exit(f"{PAGE.name} is stale; run `python tools/config_docs.py` and commit the result")


if __name__ == "__main__":
    main()
