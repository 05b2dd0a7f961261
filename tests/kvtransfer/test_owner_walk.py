"""Random walks of a LeaseOwner among readers that ask for anything at any time, and its engine.

The engine of this test keeps what a real one would: leases by name, and handovers, each of which
must end exactly once and never while its blocks are leased.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from baton.core.block import BlockId
from baton.core.request import RequestId
from baton.core.worker_info import Epoch
from kvtransfer.messages import (
    ChunkReady,
    Complete,
    FetchPrefix,
    Freeze,
    GiveUp,
    LayersRead,
    LeaseId,
    ReaderMessage,
    Renew,
    Takeover,
    Watch,
)
from kvtransfer.owner import (
    FinishHandover,
    FreezeRequest,
    LeasePrefix,
    OwnerEffect,
    ReaderId,
    ReleaseLease,
    ResumeRequest,
    Send,
    StartHandover,
)
from owner_harness import EPOCH, FIRST, HASHES, OTHER, READER, Harness

NUM_STEPS = 10_000
REQUESTS = [RequestId(f"r{i}") for i in range(6)]
READERS = [READER, OTHER, ReaderId("decode-0@d2")]


@dataclass
class _Sequence:
    num_announced: int = 0
    is_frozen: bool = False


class Engine:
    """Commands wait until the engine's turn; what it says waits until it is delivered."""

    def __init__(self, rng: random.Random, h: Harness) -> None:
        self.rng, self.h = rng, h
        self.leased: set[RequestId] = set()
        self.handovers: dict[RequestId, _Sequence] = {}
        self.commands: deque[Callable[[], None]] = deque()
        self.said: deque[Callable[[], list[OwnerEffect]]] = deque()
        self.events: Counter[str] = Counter()

    def turn(self) -> None:
        while self.commands:
            self.commands.popleft()()
        for request_id, sequence in list(self.handovers.items()):
            roll = self.rng.random()
            if sequence.is_frozen or roll < 0.5:
                continue
            if roll < 0.55:
                # It comes to its own end.
                del self.handovers[request_id]
                self.say(self.h.owner.request_ended, request_id, "ended")
            else:
                self.announce(request_id, sequence, is_last=False)

    def announce(self, request_id: RequestId, sequence: _Sequence, *, is_last: bool) -> None:
        self.leased.add(request_id)
        first, count = sequence.num_announced, self.rng.randrange(0 if is_last else 1, 3)
        sequence.num_announced += count
        self.say(
            self.h.owner.chunk_done,
            request_id,
            first_block_index=first,
            block_ids=[BlockId(first + i) for i in range(count)],
            is_last=is_last,
            first_token=FIRST if is_last else None,
        )

    def say(self, method: Callable[..., list[OwnerEffect]], *args: object, **more: object) -> None:
        self.said.append(lambda: method(*args, **more))

    def release(self, request_id: RequestId) -> None:
        self.leased.discard(request_id)

    def lease_prefix(self, wanted: LeasePrefix) -> None:
        num_cached = self.rng.randrange(len(wanted.block_hashes) + 1)
        assert wanted.request_id not in self.leased, "leased twice under one name"
        if num_cached:
            self.leased.add(wanted.request_id)
        blocks = [BlockId(i) for i in range(num_cached)]
        self.say(self.h.owner.prefix_leased, wanted.reader, wanted.request_id, blocks)

    def start(self, request_id: RequestId) -> None:
        assert request_id not in self.handovers, "handed on twice at once"
        if self.rng.random() < 0.2 or request_id in self.leased:
            self.say(self.h.owner.handover_failed, request_id, "not generating")
        else:
            self.events["started"] += 1
            self.handovers[request_id] = _Sequence()

    def freeze(self, request_id: RequestId) -> None:
        sequence = self.handovers.get(request_id)
        if sequence is not None:
            sequence.is_frozen = True
            self.announce(request_id, sequence, is_last=True)

    def resume(self, request_id: RequestId) -> None:
        assert request_id not in self.leased, "resumed under a lease"
        self.events["resumed"] += self.handovers.pop(request_id, None) is not None
        self.say(self.h.owner.handover_ended, request_id)

    def finish(self, request_id: RequestId) -> None:
        assert self.handovers.pop(request_id).is_frozen
        assert request_id not in self.leased
        self.events["finished"] += 1


class Walk:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        limits = {"lease_s": 5.0, "watch_s": 8.0, "ended_s": 12.0, "takeover_s": 20.0}
        self.h = Harness(**limits, held_s=30.0, max_prefix_fetches=4, max_takeovers=4, max_ended=20)
        self.engine = Engine(self.rng, self.h)
        self.lease_ids = [LeaseId("forged")]

    def apply(self, effects: list[OwnerEffect]) -> None:
        engine, commands = self.engine, self.engine.commands
        for effect in effects:
            match effect:
                case Send(_, ChunkReady() as chunk):
                    if chunk.lease_id not in self.lease_ids:
                        self.lease_ids = [*self.lease_ids[-12:], chunk.lease_id]
                case ReleaseLease(request_id):
                    commands.append(lambda r=request_id: engine.release(r))
                case LeasePrefix():
                    commands.append(lambda e=effect: engine.lease_prefix(e))
                case StartHandover(request_id):
                    commands.append(lambda r=request_id: engine.start(r))
                case FreezeRequest(request_id):
                    commands.append(lambda r=request_id: engine.freeze(r))
                case ResumeRequest(request_id):
                    commands.append(lambda r=request_id: engine.resume(r))
                case FinishHandover(request_id):
                    commands.append(lambda r=request_id: engine.finish(r))

    def question(self) -> ReaderMessage:
        request_id = self.rng.choice(REQUESTS)
        lease_id = self.rng.choice([self.lease_ids[0], *self.lease_ids[-4:]])
        return self.rng.choice(
            [
                Watch(request_id),
                FetchPrefix(request_id, HASHES[: self.rng.randrange(5)]),
                Takeover(request_id, self.rng.choice([3, 3, 3, 4])),
                Freeze(request_id),
                Freeze(request_id),
                Renew(lease_id),
                Complete(lease_id, EPOCH if self.rng.random() < 0.9 else Epoch("e0")),
                Complete(lease_id, EPOCH),
                LayersRead(request_id, self.rng.choice([1, 2])),
                GiveUp(request_id, "walk"),
            ]
        )

    def step(self) -> None:
        roll = self.rng.random()
        if roll < 0.55:
            reader = self.rng.choice([READER, READER, *READERS])
            self.apply(self.h.owner.receive(reader, self.question()))
        elif roll < 0.70:
            self.engine.turn()
        elif roll < 0.90:
            if self.engine.said:
                self.apply(self.engine.said.popleft()())
        elif roll < 0.91:
            self.apply(self.h.owner.reader_gone(self.rng.choice(READERS)))
        elif roll < 0.92:
            self.apply(self.h.owner.request_failed(self.rng.choice(REQUESTS), "walk"))
        else:
            self.h.clock.advance(self.rng.random())
            self.apply(self.h.owner.tick())

    def check(self) -> None:
        self.h.owner.check_integrity()
        if not self.engine.commands and not self.engine.said:
            assert self.engine.leased == set(self.h.owner.leased_requests)

    def end(self) -> None:
        """Readers are silent and time passes: everything ends."""
        for _ in range(40):
            self.h.clock.advance(1.0)
            self.apply(self.h.owner.tick())
            while self.engine.commands or self.engine.said:
                for command in list(self.engine.commands):
                    self.engine.commands.popleft()
                    command()
                if self.engine.said:
                    self.apply(self.engine.said.popleft()())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_questions_in_any_order_leave_nothing_behind(seed):
    walk = Walk(seed)
    for _ in range(NUM_STEPS):
        walk.step()
        walk.check()
    walk.end()
    walk.check()
    assert not walk.engine.leased and not walk.engine.handovers
    walk.h.finish()
    events = walk.engine.events
    assert events["started"] > 100 and events["resumed"] > 50 and events["finished"] > 5, events
