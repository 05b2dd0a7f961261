"""A rank's log lines, written by rank 0 as if they were its own: to one place, in one format.

Not known here: formats, files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from baton.engine.tensor_parallel.messages import RankLog

_FORMATTER = logging.Formatter()


class RankLogHandler(logging.Handler):
    """In the rank's process: passes every record on."""

    def __init__(self, tell: Callable[[RankLog], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._tell(_message(record))
        except Exception:
            self.handleError(record)


def send_log(tell: Callable[[RankLog], None], level: int) -> None:
    """Route the root logger of this process to rank 0, from `level` on."""
    root = logging.getLogger()
    root.handlers[:] = [RankLogHandler(tell)]
    root.setLevel(level)


def write_log(rank: int, message: RankLog) -> None:
    """In rank 0's process: write what another rank has logged, with its number."""
    logger = logging.getLogger(message.logger)
    if not logger.isEnabledFor(message.level):
        return
    text = f"rank {rank}: {message.text}"
    record = logger.makeRecord(
        message.logger,
        message.level,
        fn="",
        lno=0,
        # As an argument: the text may hold percent signs.
        msg="%s",
        args=(text,),
        exc_info=None,
        extra={"fields": {**dict(message.fields), "rank": rank}},
    )
    record.created, record.msecs = message.created_s, message.created_s % 1 * 1000
    logger.handle(record)


def _message(record: logging.LogRecord) -> RankLog:
    text = record.getMessage()
    if record.exc_info:
        text += "\n" + _FORMATTER.formatException(record.exc_info)
    fields = getattr(record, "fields", {})
    return RankLog(
        level=record.levelno,
        logger=record.name,
        text=text,
        created_s=record.created,
        fields=tuple((name, _plain(value)) for name, value in fields.items()),
    )


def _plain(value: object) -> str | int | float | bool | None:
    """What any process can unpickle."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)
