"""What every trace file has in common: text, gzip or plain, whose lines are requests in order.

A line that is none is refused with the file, its number, what is wrong, and what to do about it.
Does not know: formats.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from baton.core.errors import ConfigError

MAX_TOKENS = 10_000_000
"""Of one prompt or output; more is a mistake in the file."""
MAX_SECONDS = 1e11
"""Some thousand years after 1970: a time in nanoseconds was meant in seconds."""


@contextmanager
def opened_trace(path: Path) -> Iterator[TextIO]:
    """Raises ConfigError for a file that cannot be read as text, while it is being read too."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the trace {path}: {reason}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is not a text file") from None
    except csv.Error as error:
        raise ConfigError(f"{path.name} is not a table: {error}") from None


def tokens_of(value: object, name: str) -> int:
    """A number of tokens; traces hold requests that failed or were empty, and one token stands for
    them. Raises ValueError saying what is wrong."""
    number = _number(value, name)
    if not 0 <= number <= MAX_TOKENS:
        raise ValueError(f"{name} must be from 0 to {MAX_TOKENS} tokens, got {value}")
    if number != int(number):
        raise ValueError(f"{name} must be a whole number of tokens, got {value}")
    return max(1, int(number))


def seconds_of(value: object, name: str) -> float:
    """A time in seconds. Raises ValueError saying what is wrong."""
    number = _number(value, name)
    if not 0 <= number <= MAX_SECONDS:
        raise ValueError(f"{name} must be from 0 to {MAX_SECONDS:g} seconds, got {value}")
    return number


class LineCheck:
    """Of one file, in order of its lines."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._last_s = -math.inf

    def ordered(self, at_s: float, line: int) -> None:
        """Raises ConfigError for a request before the one of the line before."""
        if at_s < self._last_s:
            raise self.refused(
                line, f"its time is {self._last_s - at_s:g} s before that of the line before",
                "sort the file by time",
            )  # fmt: skip
        self._last_s = at_s

    def refused(
        self, line: int, why: object, fix: str = "correct or remove the line"
    ) -> ConfigError:
        return ConfigError(f"{self._name} line {line} is not a request: {why}; {fix}")


def _number(value: object, name: str) -> float:
    if value is None or value == "":
        raise ValueError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{name} must be a number, got {value!r:.60}")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be a number, got {value!r:.60}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return number
