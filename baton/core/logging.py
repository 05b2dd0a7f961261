"""Log lines: one JSON object a line for machines, or plain text on a terminal."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

import orjson

_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY


class JsonFormatter(logging.Formatter):
    """`{"at", "level", "logger", "message", ...fields}`; fields come by `extra={"fields": {}}`."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "component": self._component,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _as_json(line)


def _as_json(line: dict[str, Any]) -> str:
    try:
        return orjson.dumps(line, default=str, option=_OPTIONS).decode()
    except orjson.JSONEncodeError:
        # Integers beyond 64 bits, or text that is no Unicode: slower, and takes anything.
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Short lines for a person watching a terminal."""

    def __init__(self, component: str) -> None:
        super().__init__(
            f"%(asctime)s %(levelname)-7s {component} %(name)s: %(message)s", "%H:%M:%S"
        )


def setup_logging(
    component: str, *, level: str = "INFO", as_json: bool = True, stream: TextIO | None = None
) -> None:
    """Route the root logger to `stream` (stderr by default). Called once at a process's start."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(component) if as_json else TextFormatter(component))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def log_fields(logger: logging.Logger, message: str, **fields: Any) -> None:
    """An INFO line with structured fields."""
    if logger.isEnabledFor(logging.INFO):
        # As `info` does it, without looking up who calls, which no line names.
        record = logging.LogRecord(logger.name, logging.INFO, "", 0, message, (), None)
        record.fields = fields
        logger.handle(record)
