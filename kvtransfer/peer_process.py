"""Processes of this host as the transports see them: alive or dead, readable or not.

Everything that a transport asks of the kernel about processes and threads, through ctypes where
Python has no call. Linux only. Knows no cards and no blocks.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
from pathlib import Path

from baton.core.errors import IncompatiblePeer, PeerGone

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
# From <linux/prctl.h>.
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)
_PR_SET_TIMERSLACK = 29


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def host_id() -> str:
    """Equal for all processes of one running kernel."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()


def pid_namespace() -> str:
    """Process ids mean the same only within one of these."""
    try:
        return os.readlink(_PID_NAMESPACE)
    except OSError:
        return ""


def allow_reads_by_siblings() -> None:
    """Let processes of the same user read our memory although they are not our parents.

    Yama (ptrace_scope 1, the default of several distributions) forbids that otherwise. A kernel
    without Yama rejects the call, and has nothing to allow.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def sharpen_timers(seconds: float) -> None:
    """Let sleeps of the calling thread last longer than asked by about this much at most, in place
    of the kernel's 50 us."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(max(1, int(seconds * 1e9))), 0, 0, 0)


def read_memory(pid: int, address: int, num_bytes: int) -> bytes:
    """Bytes of another process's memory. Raises OSError as the kernel says it (EPERM, ESRCH)."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.process_vm_readv
    call.restype = ctypes.c_ssize_t
    call.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_IoVec),
        ctypes.c_ulong,
        ctypes.POINTER(_IoVec),
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
    buffer = ctypes.create_string_buffer(num_bytes)
    here = _IoVec(ctypes.addressof(buffer), num_bytes)
    there = _IoVec(address, num_bytes)
    num_read = call(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    if num_read != num_bytes:
        code = ctypes.get_errno() if num_read < 0 else errno.EFAULT
        raise OSError(code, os.strerror(code))
    return buffer.raw


class PeerProcess:
    """A handle on one process that cannot be mistaken for a later one with the same pid.

    Raises PeerGone when there is no such process, IncompatiblePeer when it cannot be watched.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise PeerGone(f"process {pid} does not exist") from None
        except OSError as error:
            raise IncompatiblePeer(
                f"process {pid} cannot be watched ({error.strerror}); Linux 5.3 or newer is needed"
            ) from None
        self._poll = select.poll()
        self._poll.register(self._pidfd, select.POLLIN)

    def is_dead(self, *, wait_s: float = 0.0) -> bool:
        """True once the process has exited, zombie or not; waits up to `wait_s` for it."""
        return self._pidfd < 0 or bool(self._poll.poll(wait_s * 1000))

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
