"""What the engine imports and a GPU machine may lack, though none of it computes anything."""

import sys
import traceback
import types


class _Log:
    """structlog's logger, as far as the engine uses it; prints what is worth a warning."""

    def __getattr__(self, level: str) -> object:
        def write(event: str, **fields: object) -> None:
            if level not in ("debug", "info"):
                print(f"   log {level}: {event} {fields}", file=sys.stderr)
                if level == "exception":
                    traceback.print_exc()

        return write


def stand_in() -> None:
    """Make `import structlog` work where it is not installed."""
    try:
        import structlog  # noqa: F401
    except ModuleNotFoundError:
        module = types.ModuleType("structlog")
        module.get_logger = lambda *args, **kwargs: _Log()
        module.is_configured = lambda: True
        sys.modules["structlog"] = module
