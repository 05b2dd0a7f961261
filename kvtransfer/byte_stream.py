"""A non-blocking TCP connection, plain or TLS, that moves bytes into and out of given buffers.

A call that can do nothing now returns 0. Knows no frames.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from baton.core.errors import TransferError

MAX_BUFFERS = 512
"""Of one system call; the kernel's limit is 1024."""
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
UNANSWERED_LIMIT_MS = 20_000
"""Sent bytes that nobody acknowledges for this long end the connection."""
_NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class StreamEnded(TransferError):
    """The other side, the network or TLS ended the connection."""


class ByteStream:
    """Owns a connected or connecting socket. Raises StreamEnded wherever it finds the end."""

    def __init__(self, sock: socket.socket | ssl.SSLSocket) -> None:
        """`sock` has its options set and, with TLS, has not shaken hands yet."""
        self._socket = sock
        self._needs_handshake = isinstance(sock, ssl.SSLSocket)
        self.wants_write = False
        """The TLS handshake waits to send."""

    def fileno(self) -> int:
        return self._socket.fileno()

    def shake_hands(self) -> bool:
        """TLS only: True once the handshake is through. Call again when the socket is ready."""
        if not self._needs_handshake or not isinstance(self._socket, ssl.SSLSocket):
            return True
        self.wants_write = False
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLWantWriteError:
            self.wants_write = True
            return False
        except OSError as error:
            raise StreamEnded(f"TLS handshake failed: {_text(error)}") from None
        self._needs_handshake = False
        return True

    def certificate(self) -> Mapping[str, Any] | None:
        """The other side's, once verified by the handshake; None without TLS."""
        return self._socket.getpeercert() if isinstance(self._socket, ssl.SSLSocket) else None

    def receive(self, num_bytes: int) -> bytes | None:
        """Up to so many bytes; None when there are none now."""
        try:
            data = self._socket.recv(num_bytes)
        except _NOT_NOW:
            return None
        except OSError as error:
            raise StreamEnded(_text(error)) from None
        if not data:
            raise StreamEnded("the other side closed the connection")
        return data

    def receive_into(self, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers in order; returns the number of bytes."""
        try:
            if isinstance(self._socket, ssl.SSLSocket):
                count = self._socket.recv_into(buffers[0])
            else:
                count = self._socket.recvmsg_into(list(islice(buffers, MAX_BUFFERS)))[0]
        except _NOT_NOW:
            return 0
        except OSError as error:
            raise StreamEnded(_text(error)) from None
        if not count:
            raise StreamEnded("the other side closed the connection")
        return count

    def send(self, buffers: Sequence[memoryview | bytes]) -> int:
        """Hand over bytes of the buffers in order; returns their number."""
        try:
            if isinstance(self._socket, ssl.SSLSocket):
                return self._socket.send(buffers[0])
            return self._socket.sendmsg(islice(buffers, MAX_BUFFERS))
        except _NOT_NOW:
            return 0
        except OSError as error:
            raise StreamEnded(_text(error)) from None

    def end_output(self) -> None:
        """Nothing more is sent; what the other side sends can still be received."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()


def set_options(sock: socket.socket) -> None:
    """Buffers keep the kernel's own sizing: a fixed size ends it, and is often capped far lower."""
    sock.setblocking(False)
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_LIMIT_MS)


def connect_error(sock: socket.socket) -> str:
    """Why a connection attempt failed, empty while it did not."""
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return errno.errorcode.get(code, str(code)) if code else ""


def _text(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or type(error).__name__}"
    return error.strerror or type(error).__name__
