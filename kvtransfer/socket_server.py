"""The owner's side of the socket transport: answers reads of the pool, straight from its memory.

One thread serves all readers and sleeps in `select` between them. Everything a reader can make us
hold is bounded: connections, the time of its handshake, frames and open reads (`socket_owner`), and
the time in which it takes nothing of what it asked for. A reader that breaks a rule is told why and
loses its own connection only.

Knows no leases: a reader that reads what was not leased to it gets bytes that it must throw away,
as with every other transport.
"""

from __future__ import annotations

import ctypes
import logging
import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass

from baton.core.errors import TransferError
from baton.core.tls import TlsFiles, names_deployment
from kvtransfer.byte_stream import MAX_BUFFERS, ByteStream, StreamEnded, set_options
from kvtransfer.metadata import PeerIdentity
from kvtransfer.plan import RankPool
from kvtransfer.socket_frames import NONCE_BYTES
from kvtransfer.socket_owner import OwnerSession
from kvtransfer.transport import PoolRegion

logger = logging.getLogger(__name__)

RECEIVE_BYTES = 1 << 16
SENDS_PER_TURN = 8
"""System calls for one reader before the others have their turn."""
STOP_TIMEOUT_S = 5.0
ACCEPT_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What readers can make the owner hold."""

    max_readers: int = 256
    handshake_timeout_s: float = 5.0
    """From the connection to the reader's plan."""
    stalled_reader_s: float = 30.0
    """A reader that takes none of its bytes for so long is dropped."""
    refusal_s: float = 1.0
    """How long a refused reader may take to read why."""


@dataclass(slots=True, eq=False)
class _Reader:
    stream: ByteStream
    session: OwnerSession
    where: str
    deadline_s: float | None
    """Of what it has to do next; None: it owes nothing."""
    events: int = 0

    @property
    def name(self) -> str:
        reader = self.session.reader
        return f"{reader.worker_id} at {self.where}" if reader is not None else self.where


class SocketServer:
    """Serves from `start` to `close`; the pool must live longer."""

    def __init__(
        self,
        region: PoolRegion,
        identity: PeerIdentity,
        secret: bytes,
        *,
        tls: TlsFiles | None = None,
        limits: ServerLimits | None = None,
    ) -> None:
        self._identity = identity
        self._secret = secret
        self._tls = tls
        self._limits = limits or ServerLimits()
        self._pool = RankPool(region.layout, region.tp_rank, region.tp_size, region.num_blocks)
        memory = (ctypes.c_char * region.num_bytes).from_address(region.address)
        self._memory = memoryview(memory).cast("B").toreadonly()
        self._readers: set[_Reader] = set()
        self._is_stopping = False
        self._listener: socket.socket | None = None
        self._waker: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None
        self.num_refused = 0

    def start(self, host: str, port: int) -> int:
        """Listen there, 0 for any port; returns the port. Raises TransferError when it cannot."""
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.create_server(
                address[:2], family=family, backlog=self._limits.max_readers
            )
        except OSError as error:
            raise TransferError(
                f"cannot listen for KV reads on {host}:{port} ({error.strerror}); set the worker's "
                "host to an address of this machine"
            ) from None
        listener.setblocking(False)
        woken, self._waker = socket.socketpair()
        woken.setblocking(False)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(woken, selectors.EVENT_READ, woken)
        self._thread = threading.Thread(target=self._run, name="kv-socket-server", daemon=True)
        self._thread.start()
        number = listener.getsockname()[1]
        assert isinstance(number, int)
        return number

    def close(self) -> None:
        """End all connections: when this returns the pool is not read any more."""
        if self._thread is None or self._waker is None:
            return
        self._is_stopping = True
        self._waker.send(b"x")
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise TransferError(f"the KV socket server did not stop within {STOP_TIMEOUT_S:g} s")
        self._waker.close()
        self._thread = None

    # Everything below runs on the server's thread.

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                for key, _ in self._selector.select(self._idle_s()):
                    if isinstance(key.data, _Reader):
                        self._serve(key.data)
                    elif key.data is None:
                        self._accept()
                self._expire()
        finally:
            self._close_all()

    def _idle_s(self) -> float | None:
        deadlines = [r.deadline_s for r in self._readers if r.deadline_s is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, address = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors, most likely. Without the pause the waiting connection would keep
            # this thread busy.
            logger.warning("a KV reader could not be accepted: %s", error.strerror)
            time.sleep(ACCEPT_PAUSE_S)
            return
        where = str(address[0])
        if len(self._readers) >= self._limits.max_readers:
            logger.warning("KV reader at %s refused: %d are connected", where, len(self._readers))
            self.num_refused += 1
            connection.close()
            return
        set_options(connection)
        if self._tls is not None:
            connection = self._tls.current().server_context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        session = OwnerSession(
            self._memory,
            self._pool,
            self._identity,
            self._secret,
            secrets.token_bytes(NONCE_BYTES),
        )
        deadline_s = time.monotonic() + self._limits.handshake_timeout_s
        reader = _Reader(ByteStream(connection), session, where, deadline_s)
        self._readers.add(reader)
        self._watch(reader, wants_input=True, wants_output=False)

    def _serve(self, reader: _Reader) -> None:
        try:
            if reader.session.is_refused:
                self._see_off(reader)
            else:
                self._move_bytes(reader)
        except StreamEnded as error:
            self._drop(reader, str(error))
        except TransferError as error:
            self._refuse(reader, str(error))
        except Exception:
            # A defect that one reader finds must not cost the others their connections.
            logger.exception("serving KV reader %s failed", reader.name)
            self._drop(reader, "internal error")

    def _move_bytes(self, reader: _Reader) -> None:
        session, stream = reader.session, reader.stream
        if not stream.shake_hands():
            self._watch(reader, wants_input=not stream.wants_write, wants_output=stream.wants_write)
            return
        if not session.has_begun:
            self._check_certificate(stream)
        # TLS may hold decrypted bytes that no event speaks of, hence until there are none.
        while session.wants_input and (data := stream.receive(RECEIVE_BYTES)) is not None:
            session.receive(data)
        num_sent = self._send(reader)
        if session.is_ready:
            if not session.has_output:
                reader.deadline_s = None
            elif num_sent or reader.deadline_s is None:
                reader.deadline_s = time.monotonic() + self._limits.stalled_reader_s
        self._watch(reader, wants_input=session.wants_input, wants_output=session.has_output)

    def _check_certificate(self, stream: ByteStream) -> None:
        """The TLS library has checked who signed it, not whom it is for."""
        tls = self._tls
        if tls is not None and not names_deployment(stream.certificate(), tls.name):
            raise StreamEnded(f"its certificate does not carry the DNS name {tls.name!r}")

    def _send(self, reader: _Reader) -> int:
        num_sent = 0
        for _ in range(SENDS_PER_TURN):
            buffers = reader.session.output(MAX_BUFFERS)
            count = reader.stream.send(buffers) if buffers else 0
            if not count:
                break
            reader.session.sent(count)
            num_sent += count
        return num_sent

    def _watch(self, reader: _Reader, *, wants_input: bool, wants_output: bool) -> None:
        events = selectors.EVENT_READ * wants_input | selectors.EVENT_WRITE * wants_output
        if events == reader.events:
            return
        if not reader.events:
            self._selector.register(reader.stream, events, reader)
        elif not events:
            self._selector.unregister(reader.stream)
        else:
            self._selector.modify(reader.stream, events, reader)
        reader.events = events

    def _refuse(self, reader: _Reader, reason: str) -> None:
        logger.warning("KV reader %s refused: %s", reader.name, reason)
        self.num_refused += 1
        reader.session.refuse(reason)
        reader.deadline_s = time.monotonic() + self._limits.refusal_s
        self._serve(reader)

    def _see_off(self, reader: _Reader) -> None:
        """Let a refused reader read why, and end the connection when it does: bytes of it that
        nobody has taken would make the kernel throw the reason away."""
        self._send(reader)
        if not reader.session.has_output:
            reader.stream.end_output()
        while reader.stream.receive(RECEIVE_BYTES) is not None:
            pass
        self._watch(reader, wants_input=True, wants_output=reader.session.has_output)

    def _expire(self) -> None:
        now_s = time.monotonic()
        for reader in [r for r in self._readers if (r.deadline_s or now_s) < now_s]:
            if reader.session.is_refused:
                self._drop(reader, "refused")
            elif reader.session.is_ready:
                self._drop(reader, f"it took no bytes for {self._limits.stalled_reader_s:g} s")
            else:
                self._drop(reader, f"no handshake within {self._limits.handshake_timeout_s:g} s")

    def _drop(self, reader: _Reader, reason: str) -> None:
        if reader not in self._readers:
            return
        logger.info("KV reader %s disconnected: %s", reader.name, reason)
        self._watch(reader, wants_input=False, wants_output=False)
        self._readers.discard(reader)
        reader.stream.close()

    def _close_all(self) -> None:
        for reader in list(self._readers):
            self._drop(reader, "this worker stops")
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
