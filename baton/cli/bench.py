"""`baton bench ...`: the serving benchmark of the source checkout."""

import runpy
import sys

from baton.cli.locate import checkout
from common.errors import ConfigError


def main(argv: list[str]) -> int:
    """Run benchmarks/serving.py with these arguments. Raises ConfigError outside a checkout."""
    script = checkout() / "benchmarks" / "serving.py"
    if not script.is_file():
        raise ConfigError(f"{script} does not exist; benchmarks need a checkout of the sources")
    sys.argv = ["baton bench", *argv]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
