"""One read over a socket: where its answer goes, until it is cancelled."""

from __future__ import annotations

from typing import Protocol

from baton.core.errors import PeerGone
from kvtransfer.byte_spans import SpanCursor
from kvtransfer.byte_stream import MAX_BUFFERS


class Pump(Protocol):
    """The connection, as its reads see it."""

    def pump(self) -> None:
        """Receive what has come. Raises PeerGone."""
        ...

    def forget(self, read: SocketRead) -> None:
        """Do not ask for it if that was not done yet."""
        ...


class SocketRead:
    """Implements `Posted`."""

    def __init__(self, connection: Pump, read_id: int, cursor: SpanCursor, request: bytes) -> None:
        self.read_id = read_id
        self.request = request
        self.num_left = cursor.num_left
        self.is_complete = False
        self._connection = connection
        self._cursor: SpanCursor | None = cursor

    @property
    def is_cancelled(self) -> bool:
        return self._cursor is None

    def is_done(self) -> bool:
        if self.is_complete:
            return True
        try:
            self._connection.pump()
        except PeerGone:
            # The end may have come right behind our last byte.
            if not self.is_complete:
                raise
        return self.is_complete

    def cancel(self) -> bool:
        self._cursor = None
        self._connection.forget(self)
        return True

    def release(self) -> None:
        """Holds nothing that others would miss."""

    def buffers(self, sink: memoryview) -> list[memoryview]:
        """Where the next bytes of the answer go."""
        if self._cursor is None:
            return [sink[: min(len(sink), self.num_left)]]
        return self._cursor.window(MAX_BUFFERS)

    def received(self, num_bytes: int) -> None:
        self.num_left -= num_bytes
        if self._cursor is not None:
            self._cursor.pass_over(num_bytes)
