import json
import subprocess
import sys

import pytest

from common.errors import ConfigError
from common.telemetry import logging

PROGRAM = """
import logging as stdlib
import structlog
from opentelemetry import trace
from common.telemetry import logging, tracing
logging.setup("decode", "info")
log = structlog.get_logger("kv")
log.debug("hidden")
log.info("handoff_landed", blocks=12, where={"a": b"x"})
stdlib.getLogger("asyncio").warning("slow %s", "task")
with trace.use_span(tracing.setup("decode").start("s")):
    log.info("inside")
try:
    raise ValueError("boom")
except ValueError:
    log.exception("crashed")
print("only this on stdout")
"""


def lines():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "only this on stdout\n"
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_every_log_line_is_one_json_object_on_stderr():
    landed, slow, inside, crashed = lines()
    assert (landed["event"], landed["blocks"], landed["level"]) == ("handoff_landed", 12, "info")
    assert landed["service"] == "decode"
    assert landed["timestamp"].endswith("Z")
    assert "trace_id" not in landed
    assert (slow["event"], slow["level"], slow["logger"]) == ("slow task", "warning", "asyncio")
    assert len(inside["trace_id"]) == 32
    assert len(inside["span_id"]) == 16
    assert "ValueError: boom" in crashed["exception"]


def test_an_unknown_level_is_refused_by_name():
    with pytest.raises(ConfigError, match="'loud'"):
        logging.setup("decode", "loud")
