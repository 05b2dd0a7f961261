"""Socket transport over real connections: hostile readers, hostile owners, and nothing late."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from baton.core.errors import PeerGone, TransferError, TransferTimeout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer import socket_connection, socket_link
from kvtransfer.block_read import MoverLimits
from kvtransfer.metadata import PeerCard, PeerIdentity, SocketEndpoint, seal_card
from kvtransfer.plan import RankPool, plan_pair
from kvtransfer.socket_frames import (
    HEADER,
    MAX_UNITS_PER_READ,
    NONCE_BYTES,
    FrameBuffer,
    FrameKind,
    Hello,
    answer_header,
    frame,
    hello_body,
    plan_body,
    read_body,
    reader_proof,
)
from kvtransfer.socket_link import SocketLink
from kvtransfer.socket_owner import OwnerSession
from kvtransfer.socket_server import ServerLimits, SocketServer

SECRET = b"secret"
NONCE = b"nonce of the test"
OWNER = PeerIdentity(WorkerId("prefill-0"), Epoch("p1"))
READER = PeerIdentity(WorkerId("decode-0"), Epoch("d1"))
NUM_BLOCKS = 32
UNTOUCHED = 0xFFFFFFFF


def ids(*units: int) -> np.ndarray:
    return np.array(units, dtype=np.int32)


def fill(pool, seed: int) -> None:
    pool.words[:] = (np.arange(NUM_BLOCKS, dtype=np.uint32) + np.uint32(seed))[:, None]


def card_of(pool, port: int, *, epoch: str = "p1") -> bytes:
    region = pool.region
    card = PeerCard(
        worker_id=OWNER.worker_id,
        epoch=Epoch(epoch),
        layout=region.layout,
        num_blocks=region.num_blocks,
        num_scratch_blocks=0,
        tp_rank=0,
        tp_size=1,
        host_id="elsewhere",
        pid_namespace="pid:[1]",
        pid=1,
        endpoints=(SocketEndpoint("127.0.0.1", port, False),),
        nonce=NONCE,
        issued_at_s=time.time(),
        expires_at_s=time.time() + 60,
    )
    return seal_card(card, SECRET)


def plan_frame(pool) -> bytes:
    region = pool.region
    rank = RankPool(region.layout, 0, 1, region.num_blocks)
    plan = plan_pair(rank, rank)
    assert plan is not None
    return frame(FrameKind.PLAN, plan_body(plan.remote))


class RawReader:
    """A client that keeps to the protocol as far as the test wants it to."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=5)
        self.frames = FrameBuffer()
        self.hello = hello_body(Hello(os.urandom(NONCE_BYTES), READER, OWNER))

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def next(self) -> tuple[FrameKind, bytes]:
        while (found := self.frames.next()) is None:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self.frames.add(data)
        return tuple(found)

    def shake_hands(self, pool) -> None:
        self.send(frame(FrameKind.HELLO, self.hello))
        _, nonce = self.next()
        self.send(frame(FrameKind.PROOF, reader_proof(SECRET, self.hello, nonce)))
        assert self.next()[0] is FrameKind.WELCOME
        self.send(plan_frame(pool))

    def read(self, *blocks: int) -> bytes:
        self.send(frame(FrameKind.READ, read_body(1, ids(*blocks))))
        kind, body = self.next()
        assert kind is FrameKind.ANSWER
        return body[8:]

    def refusal(self) -> str:
        kind, body = self.next()
        assert kind is FrameKind.REFUSED
        with pytest.raises((EOFError, ConnectionError)):
            self.next()
        return body.decode()

    def is_ended(self) -> bool:
        try:
            return self.socket.recv(1 << 16) == b""
        except ConnectionError:
            return True


@pytest.fixture
def own_pool(make_pool):
    pool = make_pool("socket", NUM_BLOCKS)
    fill(pool, 1000)
    return pool


@pytest.fixture
def serve(own_pool) -> Iterator[Callable[..., int]]:
    """Starts owners over `own_pool`, returns their ports; ends with nothing left of them."""
    started: list[SocketServer] = []
    before = set(os.listdir("/proc/self/fd"))

    def start(**limits: float) -> int:
        server = SocketServer(own_pool.region, OWNER, SECRET, limits=ServerLimits(**limits))
        started.append(server)
        return server.start("127.0.0.1", 0)

    yield start
    for server in started:
        server.close()
        server.close()
    assert not [t for t in threading.enumerate() if t.name == "kv-socket-server"]
    assert len(os.listdir("/proc/self/fd")) <= len(before) + len(clients)
    for client in clients:
        client.socket.close()
    clients.clear()


clients: list[RawReader] = []


def dial(port: int) -> RawReader:
    clients.append(RawReader(port))
    return clients[-1]


def expect_good_reader(reader: RawReader, pool) -> None:
    assert reader.read(5, 3) == pool.words[[5, 3]].tobytes()


def test_strangers_and_broken_readers_lose_only_their_own_connection(serve, own_pool):
    port = serve()
    good = dial(port)
    good.shake_hands(own_pool)
    expect_good_reader(good, own_pool)

    forged = dial(port)
    forged.send(frame(FrameKind.HELLO, forged.hello))
    _, nonce = forged.next()
    forged.send(frame(FrameKind.PROOF, reader_proof(b"guess", forged.hello, nonce)))
    assert "wrong proof" in forged.refusal()

    replayed = dial(port)
    replayed.send(frame(FrameKind.HELLO, good.hello))
    assert replayed.next()[1] != nonce
    replayed.send(frame(FrameKind.PROOF, reader_proof(SECRET, good.hello, nonce)))
    assert "wrong proof" in replayed.refusal()

    refused = {
        "socket protocol version 71": b"GET / HTTP/1.1\r\n\r\n",
        "READ frame where HELLO is due": frame(FrameKind.READ, read_body(1, ids(1))),
        "HELLO frame of 2000000 bytes": HEADER.pack(1, FrameKind.HELLO, 0, 2_000_000),
    }
    for reason, data in refused.items():
        stranger = dial(port)
        stranger.send(data)
        assert reason in stranger.refusal()

    refused = {
        "block id 32 is outside the owner's pool of 32 blocks": read_body(1, ids(0, NUM_BLOCKS)),
        "READ of 10 bytes": read_body(1, ids(0))[:10],
    }
    for reason, body in refused.items():
        known = dial(port)
        known.shake_hands(own_pool)
        known.send(frame(FrameKind.READ, body))
        assert reason in known.refusal()
    expect_good_reader(good, own_pool)


def test_cut_off_connections_leave_the_others_alone(serve, own_pool):
    port = serve()
    good = dial(port)
    good.shake_hands(own_pool)
    for data in (b"", b"\x01", frame(FrameKind.HELLO, good.hello)[:-3]):
        cut = dial(port)
        cut.send(data)
        cut.socket.close()
    reset = dial(port)
    reset.shake_hands(own_pool)
    reset.send(frame(FrameKind.READ, read_body(1, ids(*range(NUM_BLOCKS)))))
    reset.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    reset.socket.close()
    expect_good_reader(good, own_pool)


def test_silent_stranger_is_dropped_at_the_deadline_of_its_handshake(serve, own_pool):
    port = serve(handshake_timeout_s=0.2)
    good = dial(port)
    good.shake_hands(own_pool)
    silent, halfway = dial(port), dial(port)
    halfway.send(frame(FrameKind.HELLO, halfway.hello))
    assert halfway.next()[0] is FrameKind.NONCE
    assert silent.is_ended() and halfway.is_ended()
    time.sleep(0.3)
    expect_good_reader(good, own_pool)


def test_reader_that_takes_nothing_is_dropped_and_costs_nobody_else(serve, own_pool):
    port = serve(stalled_reader_s=0.3)
    good, greedy = dial(port), dial(port)
    good.shake_hands(own_pool)
    greedy.shake_hands(own_pool)
    request = frame(FrameKind.READ, read_body(1, ids(*range(NUM_BLOCKS))))
    greedy.socket.settimeout(0.2)
    with pytest.raises((TimeoutError, ConnectionError)):
        while True:
            greedy.send(request)
    expect_good_reader(good, own_pool)
    greedy.socket.settimeout(5)
    with pytest.raises(ConnectionError):
        while True:
            greedy.send(request)
            time.sleep(0.01)
    expect_good_reader(good, own_pool)


def test_number_of_readers_is_bounded(serve, own_pool):
    port = serve(max_readers=2)
    first, second = dial(port), dial(port)
    first.shake_hands(own_pool)
    second.shake_hands(own_pool)
    assert dial(port).is_ended()
    second.socket.close()
    expect_good_reader(first, own_pool)
    third = dial(port)
    third.shake_hands(own_pool)
    expect_good_reader(third, own_pool)


class ScriptedOwner:
    """An owner whose every connection is served by a function of the test."""

    def __init__(self, pool, script: Callable[[ScriptedOwner, socket.socket], None]) -> None:
        self.pool = pool
        self.script = script
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.num_connections = self.num_ended = 0
        self.go_on = threading.Event()
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.num_connections += 1
            try:
                with connection:
                    connection.settimeout(10)
                    self.script(self, connection)
            except (EOFError, ConnectionError):
                pass
            except BaseException as error:
                self.errors.append(error)
            self.num_ended += 1

    def session(self, epoch: str = "p1") -> OwnerSession:
        region = self.pool.region
        memory = (ctypes.c_char * region.num_bytes).from_address(region.address)
        return OwnerSession(
            memoryview(memory).cast("B"),
            RankPool(region.layout, 0, 1, region.num_blocks),
            PeerIdentity(OWNER.worker_id, Epoch(epoch)),
            SECRET,
            os.urandom(NONCE_BYTES),
        )

    def handle(self, connection: socket.socket, session: OwnerSession) -> None:
        """Serve as usual until the next read has come; its answer is not sent."""
        while True:
            while session.has_output and not session.is_ready:
                session.sent(connection.send(b"".join(session.output(5))))
            if session.has_output:
                return
            data = connection.recv(1 << 16)
            if not data:
                raise EOFError
            session.receive(data)

    def close(self) -> None:
        self.go_on.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert self.errors == []


@pytest.fixture
def script(own_pool) -> Iterator[Callable[..., ScriptedOwner]]:
    made: list[ScriptedOwner] = []

    def make(function: Callable[[ScriptedOwner, socket.socket], None]) -> ScriptedOwner:
        made.append(ScriptedOwner(own_pool, function))
        return made[-1]

    yield make
    for owner in made:
        owner.close()


def all_of(session: OwnerSession) -> bytes:
    out = b""
    while session.has_output:
        data = b"".join(session.output(9))
        out += data
        session.sent(len(data))
    return out


async def test_read_that_was_given_up_can_not_land(script, make_pool, open_transport):
    """The owner stalls in the middle, the reader gives up, the owner sends the rest: it is thrown
    away, and the connection serves the next read."""

    def stall(owner: ScriptedOwner, connection: socket.socket) -> None:
        session = owner.session()
        owner.handle(connection, session)
        answer = all_of(session)
        connection.sendall(answer[: len(answer) // 2])
        assert owner.go_on.wait(10)
        connection.sendall(answer[len(answer) // 2 :])
        while True:
            owner.handle(connection, session)
            connection.sendall(all_of(session))

    owner = script(stall)
    pool = make_pool("socket", NUM_BLOCKS)
    transport = open_transport("socket", pool)
    peer, _ = await transport.connect(card_of(owner.pool, owner.port), nonce=NONCE)
    blocks = list(range(8))
    with pytest.raises(TransferTimeout):
        await transport.read(peer, blocks, blocks, timeout_s=0.3)
    assert sorted(transport.settled()) == blocks, "nothing is left to wait for"
    assert (pool.words[0] == 1000).all() and pool.untouched([7])
    pool.clear()
    owner.go_on.set()
    await transport.read(peer, [20], [20], timeout_s=5)
    assert pool.holds([20], [20], 1000)
    assert pool.untouched([b for b in range(NUM_BLOCKS) if b != 20]), "late bytes landed"
    assert owner.num_connections == 1 and transport.num_recycles == 0


async def test_cancelled_reads_never_land(script, make_pool, open_transport):
    def hold(owner: ScriptedOwner, connection: socket.socket) -> None:
        session = owner.session()
        owner.handle(connection, session)
        assert owner.go_on.wait(10)
        while True:
            connection.sendall(all_of(session))
            owner.handle(connection, session)

    owner = script(hold)
    pool = make_pool("socket", NUM_BLOCKS)
    transport = open_transport("socket", pool)
    peer, _ = await transport.connect(card_of(owner.pool, owner.port), nonce=NONCE)
    reads = [asyncio.create_task(transport.read(peer, [b], [b], timeout_s=5)) for b in range(0, 10)]
    await asyncio.sleep(0.1)
    for read in reads[::2]:
        read.cancel()
    cancelled = await asyncio.gather(*reads[::2], return_exceptions=True)
    assert {type(error) for error in cancelled} == {asyncio.CancelledError}
    await asyncio.sleep(0.05)
    assert sorted(transport.settled()) == [0, 2, 4, 6, 8]
    owner.go_on.set()
    await asyncio.gather(*reads[1::2])
    odd = [1, 3, 5, 7, 9]
    assert pool.holds(odd, odd, 1000) and pool.untouched([0, 2, 4, 6, 8])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (answer_header(9, 368640) + bytes(100), "answer to read 9 of 368640 bytes where 368640"),
        (answer_header(1, 368641), "answer to read 1 of 368641 bytes where 368640 of read 1"),
        (answer_header(1, 1), "answer to read 1 of 1 bytes where 368640 of read 1 are due"),
        (frame(FrameKind.WELCOME, bytes(32)), "WELCOME frame where nobody asked for it"),
        (b"\x07" * 8, "socket protocol version 7"),
        (frame(FrameKind.REFUSED, b"not today"), "prefill-0 refused: not today"),
        (answer_header(1, 368640) + bytes(1000), "closed the connection"),
        (b"", "closed the connection"),
    ],
)
async def test_owner_that_breaks_the_protocol_fails_the_read_and_may_come_back(
    answer, reason, script, make_pool, open_transport
):
    def break_once(owner: ScriptedOwner, connection: socket.socket) -> None:
        session = owner.session()
        owner.handle(connection, session)
        if owner.num_connections == 1:
            connection.sendall(answer)
            return
        while True:
            connection.sendall(all_of(session))
            owner.handle(connection, session)

    owner = script(break_once)
    pool = make_pool("socket", NUM_BLOCKS)
    transport = open_transport("socket", pool)
    peer, _ = await transport.connect(card_of(owner.pool, owner.port), nonce=NONCE)
    with pytest.raises(PeerGone, match=reason):
        await transport.read(peer, [3], [3], timeout_s=5)
    assert transport.settled() == []
    await transport.read(peer, [4], [4], timeout_s=5)
    assert pool.holds([4], [4], 1000) and owner.num_connections == 2


async def test_connection_that_ended_while_idle_fails_no_read(script, make_pool, open_transport):
    def leave_idle(owner: ScriptedOwner, connection: socket.socket) -> None:
        session = owner.session()
        owner.handle(connection, session)
        connection.sendall(all_of(session))

    owner = script(leave_idle)
    pool = make_pool("socket", NUM_BLOCKS)
    transport = open_transport("socket", pool)
    peer, _ = await transport.connect(card_of(owner.pool, owner.port), nonce=NONCE)
    for block in range(4):
        await transport.read(peer, [block], [block], timeout_s=5)
        async with asyncio.timeout(5):
            while owner.num_ended <= block:
                await asyncio.sleep(0.01)
    assert owner.num_connections == 4 and pool.holds([0, 1, 2, 3], [0, 1, 2, 3], 1000)


async def test_successor_on_the_same_port_is_not_taken_for_the_peer(
    script, make_pool, open_transport
):
    def restart(owner: ScriptedOwner, connection: socket.socket) -> None:
        session = owner.session("p1" if owner.num_connections == 1 else "p2")
        try:
            owner.handle(connection, session)
        except TransferError as error:
            session.refuse(str(error))
            connection.sendall(all_of(session))

    owner = script(restart)
    pool = make_pool("socket", NUM_BLOCKS)
    transport = open_transport("socket", pool)
    peer, _ = await transport.connect(card_of(owner.pool, owner.port), nonce=NONCE)
    with pytest.raises(PeerGone, match="closed the connection"):
        await transport.read(peer, [3], [3], timeout_s=5)
    with pytest.raises(PeerGone, match="in epoch p2, not prefill-0 in epoch p1"):
        await transport.read(peer, [3], [3], timeout_s=5)
    with pytest.raises(PeerGone, match="not connected"):
        await transport.read(peer, [3], [3], timeout_s=5)
    assert pool.untouched([3])


async def test_owner_without_the_secret_is_not_believed(script, make_pool, open_transport):
    def lie(owner: ScriptedOwner, connection: socket.socket) -> None:
        reader = FrameBuffer()
        reader.add(connection.recv(1 << 16))
        connection.sendall(frame(FrameKind.NONCE, bytes(NONCE_BYTES)))
        connection.recv(1 << 16)
        connection.sendall(frame(FrameKind.WELCOME, bytes(32)))
        connection.recv(1 << 16)

    owner = script(lie)
    pool = make_pool("socket", NUM_BLOCKS)
    transport = open_transport("socket", pool)
    with pytest.raises(PeerGone, match="prefill-0 does not hold the cluster secret"):
        await transport.connect(card_of(owner.pool, owner.port), nonce=NONCE)


async def test_owner_that_accepts_and_says_nothing_is_given_up(
    script, make_pool, open_transport, monkeypatch
):
    monkeypatch.setattr(socket_link, "OPEN_TIMEOUT_S", 0.3)
    owner = script(lambda owner, connection: owner.go_on.wait(10))
    pool = make_pool("socket", NUM_BLOCKS)
    transport = open_transport("socket", pool)
    with pytest.raises(PeerGone, match=r"no KV transport reaches prefill-0: socket: "):
        await transport.connect(card_of(owner.pool, owner.port), nonce=NONCE)


async def test_connection_whose_owner_stalls_is_given_up_for_the_next_read(
    script, make_pool, open_transport, monkeypatch
):
    monkeypatch.setattr(socket_connection, "STALL_TIMEOUT_S", 0.5)

    def stall_once(owner: ScriptedOwner, connection: socket.socket) -> None:
        session = owner.session()
        owner.handle(connection, session)
        if owner.num_connections == 1:
            threading.Thread(target=keep_open, args=(owner, connection.dup())).start()
            return
        while True:
            connection.sendall(all_of(session))
            owner.handle(connection, session)

    def keep_open(owner: ScriptedOwner, connection: socket.socket) -> None:
        with connection:
            owner.go_on.wait(10)

    owner = script(stall_once)
    pool = make_pool("socket", NUM_BLOCKS)
    transport = open_transport("socket", pool)
    peer, _ = await transport.connect(card_of(owner.pool, owner.port), nonce=NONCE)
    with pytest.raises(TransferTimeout):
        await transport.read(peer, [3], [3], timeout_s=0.2)
    await asyncio.sleep(0.5)
    await transport.read(peer, [4], [4], timeout_s=5)
    assert pool.holds([4], [4], 1000) and owner.num_connections == 2


async def test_nobody_listens(make_pool, open_transport, own_pool):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    transport = open_transport("socket", make_pool("socket", NUM_BLOCKS))
    with pytest.raises(PeerGone, match=r"socket: prefill-0 does not accept .* \(ECONNREFUSED\)"):
        await transport.connect(card_of(own_pool, port), nonce=NONCE)


def test_read_of_more_units_than_a_frame_holds_is_cut_by_the_mover():
    """The largest piece of a mover is far below what a frame may name."""
    smallest_unit = 128
    assert MoverLimits().max_piece_bytes // smallest_unit <= MAX_UNITS_PER_READ


def test_gpu_memory_is_refused_readably(make_pool):
    pool = make_pool("socket", 4)
    region = dataclasses.replace(pool.region, device_id=0)
    with pytest.raises(TransferError, match="GPU memory is not read over sockets"):
        SocketLink(region, READER, SECRET).open()


def test_address_of_another_machine_is_refused_at_the_start(make_pool):
    server = SocketServer(make_pool("socket", 4).region, OWNER, SECRET)
    with pytest.raises(TransferError, match=r"cannot listen for KV reads on 192\.0\.2\.7:0 \("):
        server.start("192.0.2.7", 0)
    server.close()
