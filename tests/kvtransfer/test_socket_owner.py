"""The owner's session of one reader, fed with bytes: order, proof, bounds, right answers."""

from __future__ import annotations

import random

import numpy as np
import pytest

from baton.core.errors import TransferError
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.metadata import PeerIdentity
from kvtransfer.plan import PairPlan, RankPool, plan_pair
from kvtransfer.socket_frames import (
    NONCE_BYTES,
    FrameBuffer,
    FrameKind,
    Hello,
    answer_header,
    frame,
    hello_body,
    owner_proof,
    plan_body,
    read_body,
    reader_proof,
)
from kvtransfer.socket_owner import MAX_OPEN_READS, OwnerSession

SECRET = b"secret"
NONCE = bytes(range(NONCE_BYTES))
OWNER = PeerIdentity(WorkerId("prefill-0"), Epoch("p1"))
READER = PeerIdentity(WorkerId("decode-0"), Epoch("d1"))
POOL = RankPool(KvLayout("m", 1, 2, 8, 16, "bfloat16"), 0, 1, 32)
CONTENT = np.random.default_rng(2).integers(0, 256, POOL.num_bytes, dtype=np.uint8).tobytes()


def pair(block_size: int = 16) -> PairPlan:
    here = RankPool(KvLayout("m", 1, 2, 8, block_size, "bfloat16"), 0, 1, 8)
    plan = plan_pair(POOL, here)
    assert plan is not None
    return plan


def ids(*units: int) -> np.ndarray:
    return np.array(units, dtype=np.int32)


def session() -> OwnerSession:
    return OwnerSession(memoryview(CONTENT), POOL, OWNER, SECRET, NONCE)


def take(owner: OwnerSession, rng: random.Random | None = None) -> bytes:
    """Everything it has to send, in one go or in small steps."""
    out = b""
    while owner.has_output:
        data = b"".join(owner.output(5))
        count = rng.randrange(1, min(len(data), 50) + 1) if rng else len(data)
        out += data[:count]
        owner.sent(count)
    return out


def hello(owner: PeerIdentity = OWNER) -> bytes:
    return hello_body(Hello(NONCE, READER, owner))


def proof(secret: bytes = SECRET, body: bytes | None = None) -> bytes:
    return frame(FrameKind.PROOF, reader_proof(secret, body or hello(), NONCE))


def connected(plan: PairPlan) -> OwnerSession:
    owner = session()
    owner.receive(frame(FrameKind.HELLO, hello()))
    assert take(owner) == frame(FrameKind.NONCE, NONCE)
    owner.receive(proof())
    assert take(owner) == frame(FrameKind.WELCOME, owner_proof(SECRET, hello(), NONCE))
    assert owner.reader == READER and not owner.is_ready
    owner.receive(frame(FrameKind.PLAN, plan_body(plan.remote)))
    assert owner.is_ready and not owner.has_output
    return owner


@pytest.mark.parametrize("block_size", [16, 4, 64])
def test_answers_are_the_bytes_asked_for_in_order(block_size):
    rng = random.Random(block_size)
    plan = pair(block_size)
    owner = connected(plan)
    expected = b""
    stream = b""
    for read_id in range(1, 20):
        units = ids(*(rng.randrange(plan.remote.num_units) for _ in range(rng.randrange(1, 9))))
        stream += frame(FrameKind.READ, read_body(read_id, units))
        expected += answer_header(read_id, len(units) * plan.remote.unit_bytes)
        for start in plan.remote.starts(units).ravel().tolist():
            expected += CONTENT[start : start + plan.remote.piece_bytes]
    found = b""
    while stream:
        count = rng.randrange(1, 70)
        owner.receive(stream[:count])
        stream = stream[count:]
        if rng.random() < 0.3:
            found += take(owner, rng)
    assert found + take(owner, rng) == expected


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([proof()], "PROOF frame where HELLO is due"),
        ([frame(FrameKind.READ, read_body(1, ids(0)))], "READ frame where HELLO is due"),
        ([frame(FrameKind.HELLO, hello()), proof(b"other")], "wrong proof; do all workers share"),
        ([frame(FrameKind.HELLO, hello()), frame(FrameKind.PROOF, b"")], "wrong proof"),
        (
            [
                frame(FrameKind.HELLO, hello()),
                frame(FrameKind.PROOF, owner_proof(SECRET, hello(), NONCE)),
            ],
            "wrong proof",
        ),
        ([frame(FrameKind.HELLO, b"x"), proof(body=b"x")], "HELLO is malformed"),
        (
            [
                frame(FrameKind.HELLO, hello(PeerIdentity(OWNER.worker_id, Epoch("p0")))),
                proof(body=hello(PeerIdentity(OWNER.worker_id, Epoch("p0")))),
            ],
            "this is worker prefill-0 in epoch p1, not prefill-0 in epoch p0",
        ),
        ([b"\x09\x01\x00\x00\x00\x00\x00\x00"], "socket protocol version 9"),
    ],
)
def test_what_comes_before_the_proof_must_be_the_proof(frames, reason):
    owner = session()
    with pytest.raises(TransferError, match=reason):
        for data in frames:
            owner.receive(data)
            take(owner)
    assert not owner.is_ready and owner.reader is None
    owner.refuse(reason)
    assert reason.encode() in take(owner) and not owner.wants_input


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (read_body(1, ids(32)), "block id 32 is outside the owner's pool of 32"),
        (read_body(1, ids(0, 2**31 - 1)), "block id 2147483647 is outside"),
        (read_body(1, ids(0))[:-1], "READ of 11 bytes"),
        (read_body(1, ids(0))[:8], "READ of 8 bytes"),
        (b"\xff" * 12, "unit 4294967295 is beyond every pool"),
    ],
)
def test_reads_beyond_the_pool_are_refused_before_a_byte_is_sent(body, reason):
    owner = connected(pair())
    with pytest.raises(TransferError, match=reason):
        owner.receive(frame(FrameKind.READ, body))
    assert not owner.has_output


def test_plan_for_another_pool_is_refused():
    other = RankPool(POOL.layout, 0, 1, 33)
    plan = plan_pair(other, RankPool(POOL.layout, 0, 1, 8))
    assert plan is not None
    with pytest.raises(TransferError, match="plan for 33 blocks of 1024 bytes; this pool has 32"):
        connected(plan)


def test_open_reads_are_bounded_and_the_rest_waits():
    owner = connected(pair())
    request = frame(FrameKind.READ, read_body(1, ids(5)))
    owner.receive(request * (MAX_OPEN_READS + 10))
    assert not owner.wants_input
    answer = answer_header(1, 1024) + CONTENT[5 * 1024 : 6 * 1024]
    assert take(owner) == answer * (MAX_OPEN_READS + 10)
    assert owner.wants_input


def test_bad_frame_behind_good_ones_is_found_when_its_turn_comes():
    owner = connected(pair())
    request = frame(FrameKind.READ, read_body(1, ids(5)))
    owner.receive(request * MAX_OPEN_READS + frame(FrameKind.HELLO, b""))
    with pytest.raises(TransferError, match="HELLO frame where READS is due"):
        take(owner)


def test_reason_is_never_sent_where_it_would_be_taken_for_kv():
    owner = connected(pair())
    owner.receive(frame(FrameKind.READ, read_body(1, ids(5))))
    assert sum(map(len, owner.output(5))) == 16 + 1024
    owner.sent(40)
    owner.refuse("no")
    assert not owner.has_output
    whole = connected(pair())
    whole.receive(frame(FrameKind.READ, read_body(1, ids(5))))
    whole.refuse("no")
    buffer = FrameBuffer()
    buffer.add(take(whole))
    assert buffer.next() == (FrameKind.REFUSED, b"no")
