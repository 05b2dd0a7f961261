"""One rank's process as rank 0 sees it: started, asked about, ended.

The process dies with the thread that started it (PR_SET_PDEATHSIG), so that none outlives a killed
rank 0. Not known here: what is said over the connection.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

from baton.engine.tensor_parallel.environment import turn_multicast_off

PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""
MODULE = "baton.engine.tensor_parallel.rank"
END_TIMEOUT_S = 3.0
"""After SIGKILL; a process that still exists then hangs in the kernel."""


class RankProcess:
    """Starts at construction. `connection` is closed by whoever reads it last."""

    def __init__(self, rank: int, inherited_fds: Sequence[int]) -> None:
        """Raises OSError."""
        self.rank = rank
        ours, theirs = socket.socketpair()
        self.service, their_service = socket.socketpair()
        """To the rank's service, see `rank_service`; closed by whoever uses it."""
        with theirs, their_service:
            fds = (theirs.fileno(), their_service.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, *map(str, fds)],
                stdin=subprocess.DEVNULL,
                pass_fds=(*fds, *inherited_fds),
                env=_environment(),
            )
        self.connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_stopped(self) -> bool:
        """True while a signal or a debugger holds the process.

        Source: proc_pid_stat(5), field 3, behind the name in brackets.
        """
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as stat:
                return stat.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
        except OSError:
            return False

    @property
    def was_killed(self) -> bool:
        """True when the process has ended by a signal."""
        code = self._process.poll()
        return code is not None and code < 0

    def hang_up(self) -> None:
        """Let the process read the end of the stream, which tells it to end."""
        with (
            contextlib.suppress(OSError),
            socket.socket(fileno=os.dup(self.connection.fileno())) as end,
        ):
            end.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """SIGKILL; also ends a stopped process. Nothing when it has ended."""
        self._process.kill()

    def wait(self, timeout_s: float = END_TIMEOUT_S) -> str | None:
        """How the process ended, in words; None while it has not."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"


def _environment() -> dict[str, str]:
    # Where we found our modules is not always where Python would look by itself.
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    turn_multicast_off(environ)
    return environ


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def die_with(root_pid: int) -> None:
    """SIGKILL for this process when the thread of `root_pid` that started it ends. Linux only."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != root_pid:
        # Rank 0 was faster to end than we were to ask.
        raise SystemExit(0)


def leave_signals_to_root() -> None:
    """Rank 0 decides when its ranks end, also where a signal goes to all processes at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
