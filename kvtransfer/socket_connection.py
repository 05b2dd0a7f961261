"""The reader's side of one socket connection: a handshake, then reads into the local pool.

    connecting ─► (TLS) ─► HELLO ─► PROOF ─► ready: READ ... ◄─ ANSWER ...

Nothing here waits: `pump` does what can be done now. Bytes land only inside of `pump`, called by
one thread, in buffers of reads that were not cancelled; the rest of a cancelled answer is thrown
away. So a cancelled read is over when `cancel` returns, whatever the owner and the network do.
"""

from __future__ import annotations

import errno
import hmac
import secrets
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from baton.core.errors import PeerGone
from baton.core.tls import TlsFiles
from kvtransfer.byte_spans import SpanCursor, byte_spans
from kvtransfer.byte_stream import (
    MAX_BUFFERS,
    ByteStream,
    StreamEnded,
    connect_error,
    set_options,
)
from kvtransfer.link import ConnectionLost
from kvtransfer.metadata import PeerIdentity
from kvtransfer.plan import BlockIds, PairPlan
from kvtransfer.socket_frames import (
    HEADER,
    NONCE_BYTES,
    READ_ID,
    BadFrame,
    FrameBuffer,
    FrameKind,
    Hello,
    frame,
    hello_body,
    owner_proof,
    parse_header,
    plan_body,
    read_body,
    reader_proof,
)
from kvtransfer.socket_read import SocketRead

HANDSHAKE_TIMEOUT_S = 2.0
STALL_TIMEOUT_S = 10.0
"""An owner that owes bytes and sends none for so long is given up with its connection."""
PUMP_BYTES = 16 << 20
"""Received in one call, so that other links have their turn."""
SINK_BYTES = 256 << 10
_RECEIVE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Route:
    """How to reach an owner, resolved."""

    family: int
    address: tuple[str, int]
    host: str
    """As named by the owner."""
    tls: TlsFiles | None


@dataclass(frozen=True, slots=True)
class Exchange:
    """Who reads from whom, what is read, and where it lands."""

    reader: PeerIdentity
    owner: PeerIdentity
    secret: bytes
    plan: PairPlan
    memory: memoryview
    """Of the local pool, writable."""


class _Stage(Enum):
    CONNECTING = auto()
    TLS = auto()
    NONCE = auto()
    WELCOME = auto()
    READY = auto()
    CLOSED = auto()


class SocketConnection:
    """One connection to one owner. All calls from one thread, or from one after the other."""

    def __init__(
        self, route: Route, exchange: Exchange, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Starts to connect."""
        self._route = route
        self._exchange = exchange
        self._clock = clock
        self._who = exchange.owner.worker_id
        self._stage = _Stage.CONNECTING
        self._failure: PeerGone | None = None
        self._outgoing: deque[memoryview] = deque()
        self._reads: deque[SocketRead] = deque()
        """Asked for or to be asked for, in order."""
        self._num_asked = 0
        self._next_read_id = 1
        self._frames = FrameBuffer()
        self._head = bytearray()
        self._answer: SocketRead | None = None
        self._sink = memoryview(bytearray(SINK_BYTES))
        self._deadline_s = clock() + HANDSHAKE_TIMEOUT_S
        self._hello = hello_body(
            Hello(secrets.token_bytes(NONCE_BYTES), exchange.reader, exchange.owner)
        )
        self._socket = socket.socket(route.family, socket.SOCK_STREAM)
        set_options(self._socket)
        self._stream: ByteStream | None = None
        code = self._socket.connect_ex(route.address)
        if code not in (0, errno.EINPROGRESS):
            self._close(ConnectionLost(f"{self._who}: {errno.errorcode.get(code, code)}"))

    @property
    def is_ready(self) -> bool:
        return self._stage is _Stage.READY

    @property
    def is_closed(self) -> bool:
        return self._stage is _Stage.CLOSED

    @property
    def is_idle(self) -> bool:
        """Nobody waits for a byte."""
        return all(read.is_cancelled for read in self._reads)

    def read(self, remote: BlockIds, local: BlockIds) -> SocketRead:
        """Ask for units; the answer lands as `pump` is called. Raises as `pump` does."""
        plan = self._exchange.plan
        cursor = SpanCursor(self._exchange.memory, byte_spans(plan.local, local))
        request = frame(FrameKind.READ, read_body(self._next_read_id, remote))
        read = SocketRead(self, self._next_read_id, cursor, request)
        self._next_read_id += 1
        if not self._reads:
            self._deadline_s = max(self._deadline_s, self._clock() + STALL_TIMEOUT_S)
        self._reads.append(read)
        read.is_done()
        return read

    def forget(self, read: SocketRead) -> None:
        """A cancelled read that was not asked for yet never will be."""
        if read in self._reads and self._reads.index(read) >= self._num_asked:
            self._reads.remove(read)

    def pump(self) -> None:
        """Raises ConnectionLost, or PeerGone when this owner will never answer us."""
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        try:
            self._go_on()
        except StreamEnded as error:
            self._close(ConnectionLost(f"connection to {self._who} ended: {error}"))
        except BadFrame as error:
            self._close(ConnectionLost(f"{self._who} broke the protocol: {error}"))
        except PeerGone as error:
            self._close(error)
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))

    def wait(self, timeout_s: float) -> None:
        """Until there may be something to pump."""
        poll = select.poll()
        events = select.POLLIN
        if self._stage is _Stage.CONNECTING or self._outgoing:
            events |= select.POLLOUT
        poll.register(self._socket, events)
        poll.poll(timeout_s * 1000)

    def close(self) -> None:
        self._close(ConnectionLost(f"connection to {self._who} was closed"))

    def _close(self, failure: PeerGone) -> None:
        if self._stage is _Stage.CLOSED:
            return
        self._stage = _Stage.CLOSED
        self._failure = failure
        self._reads.clear()
        self._answer = None
        (self._stream or self._socket).close()

    def _go_on(self) -> None:
        if self._stage is _Stage.CONNECTING:
            self._finish_connecting()
        if self._stage is _Stage.TLS:
            self._finish_tls()
        if self._stage in (_Stage.NONCE, _Stage.WELCOME):
            self._shake_hands()
        if self._stage is _Stage.READY:
            self._ask()
            self._receive()
        is_owed = self._num_asked or self._stage is not _Stage.READY
        if is_owed and self._clock() > self._deadline_s:
            raise ConnectionLost(f"{self._who} sent nothing until the deadline of its connection")

    def _finish_connecting(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        if not poll.poll(0):
            return
        failure = connect_error(self._socket)
        if failure:
            raise ConnectionLost(f"{self._who} does not accept a connection ({failure})")
        tls = self._route.tls
        if tls is not None:
            self._socket = tls.current().client_context.wrap_socket(
                self._socket, server_hostname=tls.name, do_handshake_on_connect=False
            )
        self._stream = ByteStream(self._socket)
        self._stage = _Stage.TLS

    def _finish_tls(self) -> None:
        assert self._stream is not None
        if self._stream.shake_hands():
            self._put(frame(FrameKind.HELLO, self._hello))
            self._stage = _Stage.NONCE

    def _shake_hands(self) -> None:
        assert self._stream is not None
        self._flush()
        data = self._stream.receive(_RECEIVE_BYTES)
        if data is not None:
            self._frames.add(data)
        while self._stage is not _Stage.READY and (found := self._frames.next()) is not None:
            kind, body = found
            if kind is FrameKind.REFUSED:
                raise PeerGone(f"{self._who} refused: {body.decode(errors='replace')}")
            if kind is FrameKind.NONCE and self._stage is _Stage.NONCE:
                self._prove(body)
            elif kind is FrameKind.WELCOME and self._stage is _Stage.WELCOME:
                self._check_owner(body)
            else:
                raise BadFrame(f"{kind.name} frame where {self._stage.name} is due")
        self._flush()

    def _prove(self, nonce: bytes) -> None:
        secret = self._exchange.secret
        self._expected = owner_proof(secret, self._hello, nonce)
        self._put(frame(FrameKind.PROOF, reader_proof(secret, self._hello, nonce)))
        self._stage = _Stage.WELCOME

    def _check_owner(self, proof: bytes) -> None:
        if not hmac.compare_digest(proof, self._expected):
            raise PeerGone(f"what answers for {self._who} does not hold the cluster secret")
        self._put(frame(FrameKind.PLAN, plan_body(self._exchange.plan.remote)))
        self._stage = _Stage.READY
        self._touch()

    def _ask(self) -> None:
        """Send the requests of reads that were not asked for yet."""
        while self._num_asked < len(self._reads):
            self._put(self._reads[self._num_asked].request)
            self._num_asked += 1
        self._flush()

    def _receive(self) -> None:
        assert self._stream is not None
        num_received = 0
        while num_received < PUMP_BYTES:
            if self._answer is None and not self._take_header():
                return
            answer = self._answer
            if answer is None:
                continue
            count = self._stream.receive_into(answer.buffers(self._sink))
            if not count:
                return
            num_received += count
            self._touch()
            answer.received(count)
            if not answer.num_left:
                answer.is_complete = True
                self._reads.popleft()
                self._num_asked -= 1
                self._answer = None

    def _take_header(self) -> bool:
        """Read on at the head of the next frame; False when there is nothing now."""
        assert self._stream is not None
        wanted = HEADER.size
        kind, length = FrameKind.ANSWER, 0
        if len(self._head) >= HEADER.size:
            kind, length = parse_header(self._head[: HEADER.size])
            wanted += READ_ID.size if kind is FrameKind.ANSWER else length
        if len(self._head) < wanted:
            data = self._stream.receive(wanted - len(self._head))
            if data is None:
                return False
            self._head += data
            return True
        body = bytes(self._head[HEADER.size :])
        self._head.clear()
        if kind is FrameKind.REFUSED:
            raise ConnectionLost(f"{self._who} refused: {body.decode(errors='replace')}")
        if kind is not FrameKind.ANSWER or not self._num_asked:
            raise BadFrame(f"{kind.name} frame where nobody asked for it")
        (read_id,) = READ_ID.unpack(body)
        first = self._reads[0]
        if (read_id, length) != (first.read_id, READ_ID.size + first.num_left):
            raise BadFrame(
                f"answer to read {read_id} of {length - READ_ID.size} bytes where "
                f"{first.num_left} of read {first.read_id} are due"
            )
        self._answer = first
        return True

    def _put(self, data: bytes) -> None:
        self._outgoing.append(memoryview(data))

    def _flush(self) -> None:
        assert self._stream is not None
        while self._outgoing:
            count = self._stream.send(list(self._outgoing)[:MAX_BUFFERS])
            if not count:
                return
            while count:
                first = self._outgoing.popleft()
                if count < len(first):
                    self._outgoing.appendleft(first[count:])
                count -= min(count, len(first))

    def _touch(self) -> None:
        self._deadline_s = self._clock() + STALL_TIMEOUT_S
