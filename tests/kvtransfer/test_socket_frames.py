"""Frames of the socket transport: what is understood, what is refused before it is believed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from baton.core.errors import TransferError
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.metadata import PeerIdentity
from kvtransfer.plan import RankPool, plan_pair
from kvtransfer.socket_frames import (
    HEADER,
    MAX_UNITS_PER_READ,
    NONCE_BYTES,
    VERSION,
    BadFrame,
    FrameBuffer,
    FrameKind,
    Hello,
    frame,
    hello_body,
    owner_proof,
    parse_header,
    parse_hello,
    parse_plan,
    parse_read,
    plan_body,
    read_body,
    reader_proof,
    refused_frame,
)

SECRET = b"secret"
NONCE = bytes(range(NONCE_BYTES))
HELLO = Hello(
    NONCE,
    PeerIdentity(WorkerId("decode-0"), Epoch("d1")),
    PeerIdentity(WorkerId("prefill-é"), Epoch("p1")),
)


def side():
    small, large = (
        RankPool(KvLayout("m", 2, 2, 64, size, "bfloat16"), 0, 1, 32) for size in (16, 64)
    )
    plan = plan_pair(large, small)
    assert plan is not None
    return plan.remote


def test_frames_survive_any_cut_of_the_stream():
    rng = random.Random(1)
    frames = [(FrameKind.READ, rng.randbytes(rng.randrange(1, 60))) for _ in range(50)]
    stream = b"".join(frame(kind, body) for kind, body in frames)
    buffer, found = FrameBuffer(), []
    while stream:
        count = rng.randrange(1, 40)
        buffer.add(stream[:count])
        stream = stream[count:]
        while (one := buffer.next()) is not None:
            found.append(tuple(one))
    assert found == frames


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (HEADER.pack(VERSION + 1, 1, 0, 4), f"version {VERSION + 1}, {VERSION} is spoken here"),
        (HEADER.pack(VERSION, 0, 0, 4), "unknown frame kind 0"),
        (HEADER.pack(VERSION, 99, 0, 4), "unknown frame kind 99"),
        (HEADER.pack(VERSION, 1, 7, 4), "unknown frame kind 1"),
        (HEADER.pack(VERSION, FrameKind.HELLO, 0, 1 << 31), "HELLO frame of 2147483648 bytes"),
        (HEADER.pack(VERSION, FrameKind.READ, 0, 1 << 20), "READ frame of 1048576 bytes, limit"),
        (b"GET / HT", "socket protocol version 71"),
    ],
)
def test_wrong_headers_are_refused_before_their_body_comes(header, reason):
    with pytest.raises(BadFrame, match=reason):
        parse_header(header)
    buffer = FrameBuffer()
    buffer.add(header)
    with pytest.raises(BadFrame):
        buffer.next()


def test_bodies_survive_the_wire():
    assert parse_hello(hello_body(HELLO)) == HELLO
    plan = side()
    found = parse_plan(plan_body(plan))
    assert (found.offsets == plan.offsets).all()
    assert (found.num_blocks, found.block_bytes, found.piece_bytes) == (
        plan.num_blocks,
        plan.block_bytes,
        plan.piece_bytes,
    )
    units = np.array([5, 0, 2**31 - 1], dtype=np.int32)
    read_id, asked = parse_read(read_body(2**63, units))
    assert read_id == 2**63 and asked.tolist() == units.tolist()
    assert len(refused_frame("x" * 5000)) == HEADER.size + 500


def test_own_frames_are_bounded_too():
    with pytest.raises(BadFrame, match="limit 65536"):
        read_body(1, np.zeros(MAX_UNITS_PER_READ + 1, dtype=np.int32))
    long = PeerIdentity(WorkerId("w" * 300), Epoch("e"))
    with pytest.raises(BadFrame, match="name of 300 bytes"):
        hello_body(Hello(NONCE, long, long))


@pytest.mark.parametrize(
    ("parse", "body"),
    [
        (parse_hello, hello_body(HELLO)),
        (parse_plan, plan_body(side())),
        (parse_read, read_body(7, np.arange(9, dtype=np.int32))),
    ],
)
def test_hostile_bodies_raise_nothing_but_our_errors(parse, body):
    rng = random.Random(5)
    for _ in range(3000):
        hostile = bytearray(body)
        for _ in range(rng.randrange(1, 4)):
            hostile[rng.randrange(len(hostile))] = rng.randrange(256)
        cut = rng.randrange(len(hostile) + 1) if rng.random() < 0.5 else len(hostile)
        try:
            parse(bytes(hostile[:cut]))
        except TransferError:
            continue
    for cut in range(len(body) - 1):
        if parse is parse_read and cut > 8 and cut % 4 == 0:
            continue
        with pytest.raises(TransferError):
            parse(body[:cut])


@pytest.mark.parametrize(
    "changes",
    [{"offsets": 1 << 40}, {"offsets": -1}, {"piece_bytes": 0}, {"block_bytes": 1 << 63}],
)
def test_pieces_outside_of_their_block_are_refused(changes):
    plan = side()
    body = bytearray(plan_body(plan))
    for name, value in changes.items():
        position = {"block_bytes": 12, "piece_bytes": 20, "offsets": 28}[name]
        body[position : position + 8] = (value % (1 << 64)).to_bytes(8, "big")
    with pytest.raises(TransferError):
        parse_plan(bytes(body))


def test_proofs_differ_by_side_secret_and_every_part_of_the_exchange():
    hello = hello_body(HELLO)
    other = hello_body(Hello(NONCE, HELLO.owner, HELLO.reader))
    proofs = {
        reader_proof(SECRET, hello, NONCE),
        owner_proof(SECRET, hello, NONCE),
        reader_proof(b"other", hello, NONCE),
        reader_proof(SECRET, other, NONCE),
        reader_proof(SECRET, hello, bytes(NONCE_BYTES)),
    }
    assert len(proofs) == 5
