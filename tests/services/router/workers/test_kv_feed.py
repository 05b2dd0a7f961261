from __future__ import annotations

import asyncio
import logging

import grpc
import pytest

from baton.core.block import BlockHash, join_hashes, split_hashes
from baton.core.kv_layout import KvLayout
from baton.core.tier import Tier
from baton.rpc.convert import hashing_to_wire
from baton.rpc.v1 import worker_pb2 as pb
from services.router.workers.kv_feed import MAX_REPAIRS, KvFault, KvFeed

LAYOUT = KvLayout("model", 2, 2, 8, 4, "float32")
MAX_BLOCKS = 1000


def block(number):
    return BlockHash(number.to_bytes(16, "big"))


def blocks(*numbers):
    return join_hashes([block(n) for n in numbers])


def stored(*numbers):
    return pb.KvEvent(stored=blocks(*numbers))


def welcome(sequence=0, cached=b"", host=b"", disk=b"", hashing=None, left_out=0):
    return pb.Welcome(
        num_left_out=left_out,
        kv_sequence=sequence,
        cached_hashes=cached,
        host_hashes=host,
        disk_hashes=disk,
        hashing=hashing or hashing_to_wire(LAYOUT),
    )


class Known:
    """What an index would hold, and what a worker would answer."""

    def __init__(self):
        self.tiers = {}
        self.given_up = []
        self.faults = []
        self.refusals = []
        self.answers = asyncio.Queue()
        self.num_fetched = 0
        self.feed = KvFeed(
            "w",
            self,
            fetch_snapshot=self.fetch,
            give_up=self.given_up.append,
            max_blocks=MAX_BLOCKS,
        )

    def start(self, message):
        self.on_snapshot(self.feed.start(message, LAYOUT))

    async def fetch(self):
        self.num_fetched += 1
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def answer(self, message):
        self.answers.put_nowait(message)
        await settle()

    def on_kv_event(self, change):
        for block_hash in split_hashes(change.removed):
            del self.tiers[block_hash]
        for tier, part in zip(
            (Tier.DISK, Tier.HOST, Tier.DEVICE),
            (change.on_disk, change.on_host, change.stored),
            strict=True,
        ):
            self.tiers.update(dict.fromkeys(split_hashes(part), tier))

    def on_snapshot(self, held):
        self.tiers = {h: tier for tier, part in held.items() for h in split_hashes(part)}

    def on_kv_fault(self, fault):
        self.faults.append(fault)

    def on_kv_refusal(self, reason):
        self.refusals.append(reason)

    def numbers(self, tier=None):
        return sorted(int.from_bytes(b, "big") for b, t in self.tiers.items() if tier in (None, t))


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_events_follow_the_snapshot_and_known_ones_are_left_out():
    known = Known()
    known.start(welcome(3, blocks(1, 3)))
    known.feed.push(3, [stored(3), stored(4)])
    known.feed.push(5, [pb.KvEvent(removed=blocks(4), stored=blocks(5))])
    assert known.numbers() == [1, 3, 5] and not known.num_fetched and not known.faults


async def test_blocks_move_between_tiers():
    known = Known()
    known.start(welcome(0, blocks(1, 2, 3), blocks(4), blocks(5)))
    assert [known.numbers(tier) for tier in Tier] == [[1, 2, 3], [4], [5]]
    known.feed.push(1, [pb.KvEvent(on_host=blocks(1, 2), removed=blocks(5))])
    known.feed.push(2, [pb.KvEvent(on_disk=blocks(1, 4), stored=blocks(2))])
    assert [known.numbers(tier) for tier in Tier] == [[2, 3], [], [1, 4]]


async def test_gap_empties_and_a_snapshot_fills_again():
    known = Known()
    known.start(welcome())
    known.feed.push(1, [stored(1)])
    known.feed.push(3, [stored(3)])
    assert known.numbers() == []
    known.feed.push(4, [stored(4), stored(5)])
    await settle()
    await known.answer(welcome(4, blocks(9)))
    assert known.numbers() == [5, 9] and known.num_fetched == 1
    assert known.faults == [KvFault.GAP] and not known.feed.refusal


async def test_no_snapshot_gives_the_session_up():
    known = Known()
    known.start(welcome())
    known.feed.push(2, [stored(2)])
    metadata = grpc.aio.Metadata()
    await settle()
    await known.answer(grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, metadata, metadata))
    assert known.given_up == ["gap in KV events and no snapshot: DEADLINE_EXCEEDED"]


async def test_snapshot_that_no_message_holds_is_refused_and_the_session_kept():
    known = Known()
    known.start(welcome(7, left_out=5_000_000))
    assert known.faults == [KvFault.TOO_LARGE] and "5000000 blocks" in known.feed.refusal
    known.feed.push(9, [stored(9)])
    assert known.numbers() == [] and not known.num_fetched and not known.given_up
    known.start(welcome(7, blocks(1)))
    assert known.numbers() == [1] and not known.feed.refusal


@pytest.mark.parametrize(
    "answer",
    [
        welcome(7, left_out=5_000_000),
        grpc.aio.AioRpcError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(),
            "received message larger than max",
        ),
    ],
)
async def test_snapshot_grown_too_large_by_the_time_of_a_gap_is_refused(answer):
    known = Known()
    known.start(welcome())
    known.feed.push(2, [stored(2)])
    await settle()
    await known.answer(answer)
    assert known.faults == [KvFault.GAP, KvFault.TOO_LARGE]
    assert len(known.refusals) == 1 and known.feed.refusal
    known.feed.push(3, [stored(3)])
    assert known.numbers() == [] and not known.given_up


async def test_snapshot_asked_for_by_an_ended_session_changes_nothing_of_the_next():
    known = Known()
    known.start(welcome())
    known.feed.push(2, [stored(2)])
    await settle()
    known.feed.stop()
    known.start(welcome(7))
    await known.answer(welcome(1, blocks(1)))
    known.feed.push(8, [stored(8)])
    assert known.numbers() == [8] and not known.given_up


async def test_replayed_events_are_left_out_and_counted():
    known = Known()
    known.start(welcome(2))
    known.feed.push(1, [stored(90), stored(91)])
    assert not known.faults, "a snapshot may contain events that were on their way"
    known.feed.push(3, [stored(3), stored(4)])
    known.feed.push(4, [pb.KvEvent(removed=blocks(4))])
    known.feed.push(3, [stored(92), stored(93), stored(5)])
    assert known.numbers() == [3, 4, 5]
    assert known.faults == [KvFault.REPLAYED] * 2 and not known.num_fetched


@pytest.mark.parametrize(
    "event",
    [
        pb.KvEvent(stored=bytes(17)),
        pb.KvEvent(stored=blocks(7), removed=bytes(1)),
        pb.KvEvent(on_host=bytes(15)),
        pb.KvEvent(on_disk=bytes(31)),
    ],
)
async def test_malformed_event_is_mended_by_a_snapshot(event):
    known = Known()
    known.start(welcome())
    known.feed.push(1, [stored(1), event, stored(3)])
    assert known.numbers() == [] and known.faults == [KvFault.MALFORMED]
    await settle()
    await known.answer(welcome(3, blocks(1, 2, 3)))
    known.feed.push(4, [stored(4)])
    assert known.numbers() == [1, 2, 3, 4] and not known.given_up


async def test_events_without_a_number_are_malformed():
    known = Known()
    known.start(welcome())
    known.feed.push(0, [stored(1)])
    assert known.faults == [KvFault.MALFORMED] and known.numbers() == []
    known.feed.stop()


async def test_worker_that_never_makes_sense_is_refused_and_its_session_kept(caplog):
    known = Known()
    known.start(welcome())
    with caplog.at_level(logging.WARNING):
        for number in range(MAX_REPAIRS + 1):
            known.feed.push(1 + number, [pb.KvEvent(stored=b"x")])
            await settle()
            await known.answer(welcome(1 + number, blocks(1)))
    assert known.num_fetched == MAX_REPAIRS
    assert len(known.refusals) == 1 and "parts of hashes" in known.feed.refusal
    assert known.numbers() == [] and not known.given_up
    assert sum("parts of hashes" in r.message for r in caplog.records) == 1, "logged once"
    known.feed.push(90, [stored(90)])
    assert known.numbers() == [] and len(known.faults) == MAX_REPAIRS + 1
    known.start(welcome(0, blocks(1)))
    known.feed.push(1, [stored(2)])
    assert known.numbers() == [1, 2], "the next session starts afresh"


async def test_good_events_between_gaps_keep_a_worker_from_being_refused():
    known = Known()
    known.start(welcome())
    number = 0
    for _ in range(3 * MAX_REPAIRS):
        number += 2
        known.feed.push(number, [stored(number)])
        await settle()
        await known.answer(welcome(number, blocks(1)))
        number += 1
        known.feed.push(number, [stored(number)])
    assert not known.refusals and known.numbers() == [1, number]


@pytest.mark.parametrize(
    ("message", "fault", "reason"),
    [
        (welcome(cached=bytes(17)), KvFault.MALFORMED, "snapshot of 17 bytes has parts of hashes"),
        (
            welcome(cached=blocks(*range(600)), host=blocks(*range(600, 1001))),
            KvFault.TOO_LARGE,
            "1001 blocks, above 1000; raise session.max_snapshot_blocks",
        ),
    ],
)
async def test_snapshot_that_cannot_be_used_is_refused(message, fault, reason):
    known = Known()
    known.start(message)
    assert known.numbers() == [] and known.faults == [fault] and reason in known.feed.refusal
    known.feed.push(1, [stored(1)])
    assert known.numbers() == [] and not known.num_fetched


async def test_snapshot_after_a_gap_is_checked_as_well():
    known = Known()
    known.start(welcome())
    known.feed.push(5, [stored(5)])
    await settle()
    await known.answer(welcome(5, disk=blocks(*range(1001))))
    assert known.numbers() == [] and len(known.refusals) == 1 and not known.given_up


async def test_snapshot_that_cannot_be_read_refuses_the_events_and_keeps_the_session():
    known = Known()
    known.start(welcome(2, blocks(1)))
    known.feed.push(5, [stored(5)])
    await settle()
    await known.answer(ValueError("a message that cannot be decoded"))
    assert known.faults == [KvFault.GAP, KvFault.MALFORMED] and not known.given_up
    assert known.refusals == ["it answers for its snapshot a message that cannot be decoded"]
    known.feed.push(6, [stored(6)])
    assert known.numbers() == [] and known.num_fetched == 1
    known.start(welcome(0, blocks(1)))
    assert known.numbers() == [1]


async def test_events_waiting_for_a_snapshot_are_bounded():
    known = Known()
    known.start(welcome())
    known.feed.push(2, [stored(2)])
    await settle()
    for number in range(3, 60):
        known.feed.push(number, [stored(*range(100))])
        assert known.feed._num_waiting_bytes <= MAX_BLOCKS * 16
    await known.answer(welcome(2, blocks(1)))
    assert known.faults == [KvFault.GAP] * 2, "what was dropped is found missing"
    await known.answer(welcome(59, blocks(9)))
    assert known.numbers() == [9]


def hashing(**changes):
    message = hashing_to_wire(LAYOUT)
    for name, value in changes.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("announced", "reason"),
    [
        (pb.BlockHashing(), "an unnamed scheme"),
        (hashing(scheme="xxh3"), "hashes blocks by xxh3, not blake2b-128"),
        (hashing(block_size=64), "blocks of 64 tokens and has 4"),
        (hashing(fingerprint="00ff"), "fingerprint '00ff' there"),
        (hashing(first_hash=bytes(16)), "another seed or release"),
    ],
)
async def test_worker_that_names_blocks_otherwise_is_refused(announced, reason):
    known = Known()
    known.start(welcome(3, blocks(1), hashing=announced))
    assert reason in known.feed.refusal and known.faults == [KvFault.HASHING]
    known.feed.push(9, [stored(9)])
    assert known.numbers() == [] and not known.num_fetched
    known.start(welcome(3, blocks(1)))
    assert known.numbers() == [1] and not known.feed.refusal
