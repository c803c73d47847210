"""Logs: one JSON object a line on stderr, events rather than sentences."""

import logging
import sys
from typing import Any

import structlog
from opentelemetry import trace

from common.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
get_logger = structlog.get_logger


def setup(service: str, level: str = "info") -> None:
    """Route structlog and the standard library's loggers to stderr as JSON lines.

    service  a field of every line
    level    one of LEVELS

    A line has `event`, `level`, `timestamp` (UTC, ISO 8601), `service`, and `trace_id` and
    `span_id` where a span is current. Raises ConfigError for an unknown level.
    """
    if level not in LEVELS:
        raise ConfigError(f"log level {level!r} is unknown; choose one of {', '.join(LEVELS)}")
    shared = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
        _ServiceName(service),
        _add_trace,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(shared))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _formatter(shared: list[Any]) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ],
    )


class _ServiceName:
    def __init__(self, service: str) -> None:
        self._service = service

    def __call__(self, logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
        event.setdefault("service", self._service)
        return event


def _add_trace(logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event.setdefault("trace_id", f"{context.trace_id:032x}")
        event.setdefault("span_id", f"{context.span_id:016x}")
    return event
