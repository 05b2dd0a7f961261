"""What a set of files holds, read anew when one of them has been replaced or rewritten.

New content that does not work leaves the old in use, since files may be half replaced. Not known
here: what the files are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from baton.core.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_Stamp = tuple[tuple[int, int, int], ...]


class FollowedFiles(Generic[T]):
    """Any thread may call."""

    def __init__(self, paths: Sequence[Path], load: Callable[[], T], *, what: str) -> None:
        """`load` reads all of `paths`; `what` they are, for the log. Raises ConfigError as it
        does."""
        self._paths = tuple(paths)
        self._load = load
        self._what = what
        self._lock = threading.Lock()
        self._stamp = _stamp(self._paths)
        self._refused: _Stamp | None = None
        self._content = load()

    def current(self) -> T:
        """What the files hold now, or the last content that worked."""
        with self._lock:
            stamp = _stamp(self._paths)
            if stamp not in (self._stamp, self._refused):
                try:
                    self._content = self._load()
                    self._stamp, self._refused = stamp, None
                    logger.info("%s were read anew", self._what)
                except ConfigError as error:
                    self._refused = stamp
                    logger.error(
                        "the %s in use stay, the new ones do not work: %s", self._what, error
                    )
            return self._content


def _stamp(paths: Sequence[Path]) -> _Stamp:
    """Changes when a file is replaced, rewritten, removed or made."""
    stamp: list[tuple[int, int, int]] = []
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            stamp.append((0, 0, 0))
        else:
            stamp.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(stamp)
