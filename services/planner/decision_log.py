"""The decision log: a file of JSON lines that is begun anew when it is full.

    decisions.jsonl   decisions.1.jsonl   decisions.2.jsonl ...   the oldest one goes

A planner never stops for its log: what cannot be written is told and left out.

Does not know: what a decision is made from.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.core.errors import ConfigError
from services.planner.decision_record import Record, from_line, to_line

logger = logging.getLogger(__name__)

STATE_EVERY = 100
"""Decisions, after which a state is written along."""
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DecisionLogConfig:
    """Where decisions are written."""

    path: Path | None = None
    """A file of JSON lines. None: nowhere, and a planner that starts again knows nothing."""
    max_bytes: int = 32 << 20
    """Then a new file is begun; a decision takes about 4 KB."""
    keep: int = 4
    """Files, the one at work included."""

    def __post_init__(self) -> None:
        if self.max_bytes < 1 << 16:
            raise ConfigError(f"log.max_bytes must be at least 65536, got {self.max_bytes}")
        if not 1 <= self.keep <= 1000:
            raise ConfigError(f"log.keep must be from 1 to 1000, got {self.keep}")


class DecisionLog:
    """One writer a file."""

    def __init__(self, config: DecisionLogConfig) -> None:
        self._config = config
        self._num_since_state: int | None = None
        """None: the next one needs a state."""
        self._is_failing = False

    def prepare(self) -> bool:
        """Before each record: begin a new file where this one is full. True when the record is to
        hold a state."""
        path = self._config.path
        try:
            if path is not None and path.exists() and path.stat().st_size > self._config.max_bytes:
                self._rotate(path)
                self._num_since_state = None
        except OSError as error:
            self._fail(error)
        return self._num_since_state is None or self._num_since_state >= STATE_EVERY

    def write(self, record: Record) -> None:
        """Append it. Failures are logged once, until it works again."""
        path = self._config.path
        if path is None:
            return
        line = to_line(record).encode() + b"\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _append(path, line)
        except OSError as error:
            self._fail(error)
            return
        if self._is_failing:
            logger.warning("decisions are written to %s again", path)
        self._is_failing = False
        if record.state is not None:
            self._num_since_state = 0
        elif self._num_since_state is not None:
            self._num_since_state += 1

    def resume(self) -> list[Record]:
        """The last decisions, from one with a state on; empty where there are none.

        A log that cannot be read is told and put aside as if it were full: a planner starts
        without it.
        """
        path = self._config.path
        if path is None or not path.exists():
            return []
        found: deque[Record] = deque(maxlen=2 * STATE_EVERY)
        try:
            _drop_half_line(path)
            for record in read_records(path):
                if record.state is not None:
                    found.clear()
                found.append(record)
        except (ConfigError, OSError) as error:
            logger.warning("starting without what was learnt before: %s", error)
            self._put_aside(path)
            return []
        return list(found) if found and found[0].state is not None else []

    def forget(self) -> None:
        """The next decision does not follow from those before: it gets a state."""
        self._num_since_state = None

    def _put_aside(self, path: Path) -> None:
        try:
            self._rotate(path)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._is_failing:
            logger.warning("decisions cannot be written to %s: %s", self._config.path, error)
        self._is_failing = True
        # What is missing cannot be replayed: the next one stands for itself.
        self._num_since_state = None

    def _rotate(self, path: Path) -> None:
        for i in range(self._config.keep - 1, 0, -1):
            older = _numbered(path, i - 1)
            if older.exists():
                older.replace(_numbered(path, i))
        path.unlink(missing_ok=True)


def read_records(path: Path) -> Iterator[Record]:
    """All decisions of a file, in order. A last line without its end is one being written.

    Raises ConfigError naming the file and the line.
    """
    try:
        with path.open("rb") as file:
            i = 0
            while line := file.readline(MAX_LINE_BYTES):
                i += 1
                where = f"{path}: line {i}"
                if not line.endswith(b"\n"):
                    if len(line) == MAX_LINE_BYTES:
                        raise ConfigError(f"{where} is longer than {MAX_LINE_BYTES} bytes")
                    return
                yield from_line(line.decode(errors="replace"), where)
    except OSError as error:
        raise ConfigError(f"cannot read the decision log {path}: {error.strerror}") from None


def _append(path: Path, line: bytes) -> None:
    """All of it or nothing."""
    with path.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, "the disk is full")
        except OSError:
            file.truncate(start)
            raise


def _drop_half_line(path: Path) -> None:
    """What a planner was writing as it was killed: the next line would continue it."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - MAX_LINE_BYTES)
        file.seek(start)
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(start + tail.rfind(b"\n") + 1)


def _numbered(path: Path, i: int) -> Path:
    return path if i == 0 else path.with_name(f"{path.stem}.{i}{path.suffix}")
