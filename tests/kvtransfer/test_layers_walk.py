"""Random walks of an owner and its readers around blocks that are read while they are computed.

Everything but the two state machines is a model: an engine that frees, fills again and cancels at
any time, memory in which what is free is overwritten at once, streams that are late and break, and
reads whose bytes come at any time until they land. What a reader takes for valid must be what the
prompt has there.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from baton.core.block import BlockId
from baton.core.errors import PeerGone
from baton.core.worker_info import WorkerId
from kvtransfer.fetch_machine import FetchMachine
from kvtransfer.fetch_state import (
    Expected,
    FetchEffect,
    Finish,
    StartRead,
    StopRead,
    ToOwner,
    TransferResult,
)
from kvtransfer.messages import (
    ChunkReady,
    Completed,
    LayersReady,
    OwnerMessage,
    ReaderMessage,
    Refused,
)
from kvtransfer.owner import OwnerEffect, ReaderId, ReleaseLease, Send
from kvtransfer.transport import ReadStats
from owner_harness import EPOCH, FIRST, OTHER, READER, Harness, R

LAYERS = 3
NUM_BLOCKS = 8
NUM_FIRST = 2
NUM_PROMPT = 4
GARBAGE = -1
NUM_STEPS = 20_000


def written(position: int, layer: int) -> int:
    return 10 * position + layer


@dataclass
class Reader:
    name: ReaderId
    machine: FetchMachine | None = None
    read: StartRead | None = None
    copied: set[tuple[int, int]] = field(default_factory=set)
    memory: list[list[int]] = field(default_factory=list)
    to_owner: deque[ReaderMessage] = field(default_factory=deque)
    from_owner: deque[OwnerMessage] = field(default_factory=deque)
    is_connected: bool = True


class Walk:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.h = Harness(lease_s=6.0, watch_s=8.0, ended_s=3.0)
        self.memory = [[GARBAGE] * LAYERS for _ in range(NUM_BLOCKS)]
        self.table: list[int] = []
        """Blocks of the sequence that is computed; empty while there is none."""
        self.num_layers, self.fill_id = 0, 0
        self.leased: list[int] = []
        self.commands: deque[Callable[[], None]] = deque()
        self.said: deque[Callable[[], list[OwnerEffect]]] = deque()
        self.readers = {name: Reader(name) for name in (READER, OTHER)}
        self.events: Counter[str] = Counter()

    # The engine.

    def compute(self) -> None:
        rng = self.rng
        if not self.table:
            # A router submits again when it has heard that the first life is over.
            is_over = not (self.leased or self.said or self.commands)
            if is_over and rng.random() < 0.3:
                self.table = rng.sample(range(NUM_BLOCKS), NUM_PROMPT)
                self.num_layers = 0
                self.fill_id += 1
                self.fill(range(NUM_FIRST), range(LAYERS))
                self.announce(0, NUM_FIRST, is_last=False)
            return
        if rng.random() < 0.05:
            self.table = []
            self.say(lambda: self.h.owner.request_failed(R, "cancelled"))
            self.events["cancelled"] += 1
            return
        self.fill(range(NUM_FIRST, NUM_PROMPT), range(self.num_layers, self.num_layers + 1))
        self.num_layers += 1
        if rng.random() < 0.8:
            ids = tuple(BlockId(b) for b in self.table[NUM_FIRST:])
            hint = LayersReady(R, self.fill_id, NUM_FIRST, ids, self.num_layers)
            self.say(lambda: self.h.owner.layers_done(R, hint))
        if self.num_layers == LAYERS:
            self.announce(NUM_FIRST, NUM_PROMPT, is_last=True)
            self.table = []

    def fill(self, positions: Iterable[int], layers: range) -> None:
        for position in positions:
            for layer in layers:
                self.memory[self.table[position]][layer] = written(position, layer)

    def announce(self, first: int, end: int, *, is_last: bool) -> None:
        block_ids = [BlockId(b) for b in self.table[first:end]]
        self.leased += block_ids
        fill_id = self.fill_id if is_last else 0
        self.say(
            lambda: self.h.owner.chunk_done(
                R,
                first_block_index=first,
                block_ids=block_ids,
                is_last=is_last,
                first_token=FIRST if is_last else None,
                fill_id=fill_id,
            )
        )

    def say(self, call: Callable[[], list[OwnerEffect]]) -> None:
        self.said.append(call)

    def release(self) -> None:
        self.leased = []

    def overwrite_free(self) -> None:
        for block in range(NUM_BLOCKS):
            if block not in self.table and block not in self.leased:
                self.memory[block] = [GARBAGE] * LAYERS

    # The owner.

    def apply(self, effects: list[OwnerEffect]) -> None:
        for effect in effects:
            match effect:
                case Send(name, message):
                    if self.readers[name].is_connected:
                        self.readers[name].from_owner.append(message)
                case ReleaseLease():
                    self.commands.append(self.release)

    # The readers.

    def do(self, reader: Reader, effects: list[FetchEffect]) -> None:
        for effect in effects:
            match effect:
                case ToOwner(message):
                    self.events[type(message).__name__] += 1
                    if reader.is_connected:
                        reader.to_owner.append(message)
                case StartRead():
                    reader.read, reader.copied = effect, set()
                case StopRead():
                    reader.read = None
                case Finish(outcome):
                    reader.machine = None
                    if isinstance(outcome, TransferResult):
                        self.check_arrived(reader)

    def check_arrived(self, reader: Reader) -> None:
        expected = [[written(p, layer) for layer in range(LAYERS)] for p in range(NUM_PROMPT)]
        assert reader.memory == expected, "what was vouched for is not the prompt's"
        self.events["arrived"] += 1

    def begin(self, reader: Reader) -> None:
        now_s = self.h.clock.now()
        peer = WorkerId("prefill-0")
        expected = Expected(R, peer, EPOCH, now_s + 30.0, num_layers=LAYERS)
        reader.machine = FetchMachine(expected, link_grace_s=2.0)
        reader.memory = [[GARBAGE] * LAYERS for _ in range(NUM_PROMPT)]
        self.do(reader, reader.machine.start())

    def hear(self, reader: Reader) -> None:
        message, machine = reader.from_owner.popleft(), reader.machine
        if machine is None:
            return
        now_s = self.h.clock.now()
        match message:
            case ChunkReady():
                self.do(reader, machine.chunk_ready(message, now_s))
            case LayersReady():
                self.do(reader, machine.layers_ready(message, now_s))
            case Completed(lease_id, valid):
                self.do(reader, machine.completed(lease_id, valid=valid, now_s=now_s))
            case Refused(_, reason):
                self.do(reader, machine.refused(reason, now_s))

    def copy(self, reader: Reader, share: float) -> None:
        """Some more of the read in flight."""
        read = reader.read
        assert read is not None
        for remote, local in zip(read.remote, read.local, strict=True):
            for layer in read.layers or range(LAYERS):
                if (local, layer) not in reader.copied and self.rng.random() < share:
                    reader.copied.add((local, layer))
                    reader.memory[local][layer] = self.memory[remote][layer]

    def land(self, reader: Reader) -> None:
        self.copy(reader, 1.0)
        self.events["by layer"] += reader.read is not None and reader.read.layers is not None
        reader.read = None
        assert reader.machine is not None
        self.do(reader, reader.machine.read_done(ReadStats(1, 1, 0.0), self.h.clock.now()))

    def break_stream(self, reader: Reader) -> None:
        reader.is_connected = False
        reader.to_owner.clear()
        reader.from_owner.clear()
        self.apply(self.h.owner.reader_gone(reader.name))
        if reader.machine is not None:
            self.do(reader, reader.machine.link_lost(self.h.clock.now()))

    def reader_step(self, reader: Reader) -> None:
        roll, machine, now_s = self.rng.random(), reader.machine, self.h.clock.now()
        if not reader.is_connected:
            if roll < 0.03:
                reader.is_connected = True
                if machine is not None:
                    self.do(reader, machine.link_restored(now_s))
        elif machine is None:
            # The router sends a request to another worker when its first one has gone.
            others = (r for r in self.readers.values() if r.is_connected)
            if roll < 0.3 and not any(r.machine is not None for r in others):
                self.begin(reader)
        elif roll < 0.3:
            local = tuple(BlockId(i) for i in range(NUM_PROMPT))
            self.do(reader, machine.reserved(local, 0, now_s))
        elif roll < 0.32:
            self.do(reader, machine.cancel("walk", now_s))
        elif roll < 0.35:
            self.break_stream(reader)
        elif roll < 0.38:
            self.break_stream(reader)
            self.do(reader, machine.peer_gone(PeerGone("walk"), now_s))

    def step(self) -> None:
        rng = self.rng
        roll = rng.random()
        reader = rng.choice(list(self.readers.values()))
        if roll < 0.08:
            self.compute()
        elif roll < 0.3 and self.said:
            self.apply(self.said.popleft()())
        elif roll < 0.36 and self.commands:
            self.commands.popleft()()
        elif roll < 0.5 and reader.from_owner:
            self.hear(reader)
        elif roll < 0.64 and reader.to_owner:
            self.apply(self.h.owner.receive(reader.name, reader.to_owner.popleft()))
        elif roll < 0.78 and reader.read is not None:
            if rng.random() < 0.5:
                self.copy(reader, 0.5)
            else:
                self.land(reader)
        elif roll < 0.97:
            self.reader_step(reader)
        else:
            self.h.clock.advance(rng.random() * 0.5)
            self.apply(self.h.owner.tick())
            if reader.machine is not None:
                self.do(reader, reader.machine.tick(self.h.clock.now()))
        self.overwrite_free()
        self.h.owner.check_integrity()
        for one in self.readers.values():
            if one.machine is not None:
                one.machine.check_integrity()


@pytest.mark.parametrize("seed", range(6))
def test_what_is_vouched_for_is_what_the_prompt_has(seed):
    walk = Walk(seed)
    for _ in range(NUM_STEPS):
        walk.step()
    events = walk.events
    assert min(events["arrived"], events["by layer"], events["cancelled"]) > 10, events
