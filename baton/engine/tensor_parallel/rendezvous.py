"""The file in which the ranks of a group find each other, as one of them has it open.

Whoever waits in the file opens it again and again by the number of its descriptor. So a wait is
ended by putting something that cannot be opened in the descriptor's place, and the number stays
ours. Not known here: what is written into the file.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path


class Rendezvous:
    """Used for one meeting. `interrupt` comes from any thread, all else from the one that meets."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._original_fd: int | None = os.dup(self._fd)
        self._lock = threading.Lock()

    @property
    def path(self) -> str:
        """Names the file in this process until `close`."""
        return str(path_of(self._fd))

    def interrupt(self) -> None:
        """Make a wait in the file raise within a moment. Nothing once the meeting is over."""
        with self._lock, socket.socket(socket.AF_UNIX) as unopenable:
            if self._original_fd is not None:
                os.dup2(unopenable.fileno(), self._fd, inheritable=False)

    def end_meeting(self) -> None:
        """Nobody waits any more: the file is there again, for what its users still write."""
        with self._lock:
            if self._original_fd is not None:
                os.dup2(self._original_fd, self._fd, inheritable=False)
                os.close(self._original_fd)
                self._original_fd = None

    def close(self) -> None:
        """After the last use of `path`. Called once."""
        self.end_meeting()
        os.close(self._fd)


def path_of(fd: int) -> Path:
    """A name of an open file for this process."""
    return Path(f"/proc/self/fd/{fd}")
