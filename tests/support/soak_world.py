"""Workers, streams and time of the soak, and everything that can go wrong between them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from dataclasses import dataclass, field

from baton.core.block import BlockId
from baton.core.clock import ManualClock
from baton.core.request import RequestId, TokenDelta
from baton.core.worker_info import Epoch, WorkerId
from baton.engine.block_state import BlockState
from kvtransfer.fake_transport import FakeFabric
from kvtransfer.messages import OwnerMessage, ReaderMessage
from kvtransfer.owner import ReaderId
from soak_router import Router
from soak_worker import BLOCK_SIZE, Worker

NONCE = bytes(range(16))
NUM_BLOCKS = 36
MAX_OPEN = 14


@dataclass(slots=True)
class _Stream:
    """From one reader to one owner."""

    is_up: bool = True
    to_owner: deque[ReaderMessage] = field(default_factory=deque)
    to_reader: deque[OwnerMessage] = field(default_factory=deque)

    def clear(self) -> None:
        self.to_owner.clear()
        self.to_reader.clear()


class World:
    """Implements `Wire`. `act` does one random operation; `check` holds after each."""

    def __init__(self, rng: random.Random, num_workers: int = 3) -> None:
        self.rng = rng
        self.events: Counter[str] = Counter()
        self.clock = ManualClock(1000.0)
        self.fabric = FakeFabric()
        self.router = Router(rng, self.events)
        self.workers: dict[WorkerId, Worker] = {}
        self.streams: dict[tuple[WorkerId, WorkerId], _Stream] = {}
        self.num_started = 0
        self._names = [WorkerId(f"w{i}") for i in range(num_workers)]

    async def start(self) -> None:
        for name in self._names:
            await self._start(name)

    async def _start(self, name: WorkerId) -> None:
        self.num_started += 1
        worker = Worker(
            name,
            Epoch(f"e{self.num_started}"),
            fabric=self.fabric,
            clock=self.clock,
            wire=self,
            num_blocks=NUM_BLOCKS,
            depth=self.rng.choice([1, 2]),
        )
        for other in self.workers.values():
            if other.worker_id != name:
                await worker.transport.connect(other.transport.card(NONCE), nonce=NONCE)
                await other.transport.connect(worker.transport.card(NONCE), nonce=NONCE)
                self.streams[name, other.worker_id] = _Stream()
                self.streams[other.worker_id, name] = _Stream()
        self.workers[name] = worker

    # Wire.

    def on_delta(self, worker: Worker, delta: TokenDelta) -> None:
        self.router.on_delta(worker, delta)

    def to_owner(self, reader: Worker, owner: WorkerId, message: ReaderMessage) -> None:
        stream = self.streams[reader.worker_id, owner]
        if stream.is_up:
            stream.to_owner.append(message)

    def to_reader(self, owner: Worker, reader: ReaderId, message: OwnerMessage) -> None:
        for (reader_id, owner_id), stream in self.streams.items():
            is_same = self.workers[reader_id].reader_id == reader
            if owner_id == owner.worker_id and is_same and stream.is_up:
                stream.to_reader.append(message)

    # Operations.

    async def act(self) -> None:
        roll = self.rng.random()
        if roll < 0.14:
            self._any().turn()
        elif roll < 0.38:
            self._any().deliver()
        elif roll < 0.66:
            self.pump()
        elif roll < 0.82:
            self.land()
        elif roll < 0.88:
            self.let_time_pass(self.rng.random() * 0.1, share=0.7)
        else:
            await self.act_rarely(self.rng.random())
        await self.settle()

    async def act_rarely(self, roll: float) -> None:
        router, workers = self.router, list(self.workers.values())
        if roll < 0.22:
            if len(router.open) < MAX_OPEN:
                router.new_call()
        elif roll < 0.46:
            if router.waiting:
                router.place(workers)
        elif roll < 0.64:
            router.take_over(workers)
        elif roll < 0.78:
            self.fetch_prefix()
        elif roll < 0.81:
            router.cancel()
        elif roll < 0.83:
            router.give_up_takeover()
        elif roll < 0.87:
            self.break_or_restore_a_stream()
        elif roll < 0.90:
            await self.blink()
        elif roll < 0.93:
            self.expire_a_read()
        elif roll < 0.945:
            self.let_time_pass(self.rng.choice([1.0, 1.0, 3.0, 7.0, 40.0]), share=0.5)
        elif roll < 0.97:
            self.refuse_something()
        elif roll < 0.985:
            self._any().runner.fail_with = RuntimeError("injected")
            self.events["injected"] += 1
        else:
            await self.restart(self._any())

    def pump(self) -> None:
        """Some messages of one stream arrive."""
        busy = [
            (pair, stream)
            for pair, stream in self.streams.items()
            if stream.to_owner or stream.to_reader
        ]
        if not busy:
            return
        (reader_id, owner_id), stream = self.rng.choice(busy)
        reader, owner = self.workers[reader_id], self.workers[owner_id]
        for _ in range(self.rng.randrange(1, 6)):
            if stream.to_owner and (not stream.to_reader or self.rng.random() < 0.5):
                message = stream.to_owner.popleft()
                owner.apply(owner.owner.receive(reader.reader_id, message))
            elif stream.to_reader:
                reader.fetcher.receive(owner_id, stream.to_reader.popleft())

    def land(self) -> None:
        worker = self._any()
        if worker.transport.open_reads:
            worker.land(self.rng.choice(worker.transport.open_reads))

    def expire_a_read(self) -> None:
        worker = self._any()
        if worker.transport.open_reads:
            worker.transport.expire(self.rng.choice(worker.transport.open_reads))

    def fetch_prefix(self) -> None:
        if not self.router.chains:
            return
        reader, owner = self.rng.sample(list(self.workers.values()), 2)
        chain = self.rng.choice(self.router.chains)
        hashes = chain[: self.rng.randrange(1, len(chain) + 1)] if chain else []
        self.events["fetches"] += 1
        if hashes:
            reader.fetch_prefix(RequestId(f"f{self.events['fetches']}"), owner, hashes)

    def break_or_restore_a_stream(self) -> None:
        (reader_id, owner_id), stream = self.rng.choice(list(self.streams.items()))
        if stream.is_up:
            self._break(reader_id, owner_id, stream)
        else:
            self._restore(reader_id, owner_id, stream)

    async def blink(self) -> None:
        """A stream is away while its reader reads what the owner has taken back and used anew.

        Only the answer to Complete can tell the reader, when the stream is there again.
        """
        reads = [(w, read) for w in self.workers.values() for read in w.transport.open_reads]
        if not reads:
            return
        reader, read = self.rng.choice(reads)
        pair = reader.worker_id, read.peer
        stream, owner = self.streams[pair], self.workers[read.peer]
        if not stream.is_up:
            return
        self._break(*pair, stream)
        for request_id in owner.owner.leased_requests:
            owner.apply(owner.owner.request_failed(request_id, "injected"))
        for _ in range(8):
            owner.turn()
            owner.deliver()
        await self.settle()
        for late in [r for r in reader.transport.open_reads if r.peer == owner.worker_id]:
            reader.land(late)
        await self.settle()
        self._restore(*pair, stream)

    def let_time_pass(self, seconds: float, *, share: float = 1.0) -> None:
        """Only a share of the workers notices at once: the others are busy, or were stopped."""
        self.clock.advance(seconds)
        for worker in self.workers.values():
            if self.rng.random() < share:
                worker.tick()

    def refuse_something(self) -> None:
        """An owner that does not want to deliver, for reasons of its own."""
        worker = self._any()
        named = [call.request_id for call in self.router.open] + worker.owner.leased_requests * 4
        if named:
            self.events["refusals"] += 1
            worker.apply(worker.owner.request_failed(self.rng.choice(named), "injected"))

    async def restart(self, old: Worker) -> None:
        """The process dies, and another comes up under the same name."""
        self.events["restarts"] += 1
        old.is_dead = True
        self.fabric.kill(old.worker_id)
        for pair, stream in self.streams.items():
            if old.worker_id in pair:
                stream.clear()
        await old.fetcher.close()
        await self.settle()
        others = [w for w in self.workers.values() if w is not old]
        for other in others:
            other.apply(other.owner.reader_gone(old.reader_id))
            if self.rng.random() < 0.5:
                other.fetcher.peer_gone(old.worker_id, old.epoch, "its process has ended")
            else:
                other.fetcher.link_lost(old.worker_id, old.epoch)
        await self._start(old.worker_id)
        for other in others:
            other.fetcher.link_restored(old.worker_id, self.workers[old.worker_id].epoch)
        self.router.died(old)

    async def settle(self) -> None:
        """Let reads begin and end; a task needs three rounds at most."""
        for _ in range(4):
            await asyncio.sleep(0)

    async def drain(self) -> None:
        """No more faults and no new calls: everything must come to its end."""
        for (reader_id, owner_id), stream in self.streams.items():
            if not stream.is_up:
                self._restore(reader_id, owner_id, stream)
        for _ in range(4000):
            if not self.router.open:
                break
            for worker in self.workers.values():
                worker.turn()
                worker.deliver()
                self.pump()
                await self.settle()
                self.land()
            if self.router.waiting:
                self.router.place(list(self.workers.values()))
            self.let_time_pass(0.01)
            await self.settle()
            self.check()
        assert not self.router.open, f"{len(self.router.open)} calls hang"
        await self._come_to_rest()

    async def _come_to_rest(self) -> None:
        """Nobody wants anything: leases expire, given-up reads land, fetches reach deadlines."""
        for _ in range(60):
            for worker in self.workers.values():
                worker.turn()
                while worker.results:
                    worker.deliver()
                await self.settle()
                for read in list(worker.transport.open_reads):
                    worker.land(read)
            for _ in range(20):
                self.pump()
            self.let_time_pass(1.0)
            await self.settle()

    # What must always hold.

    def check(self) -> None:
        assert not self.events["writes into blocks in use"]
        for worker in self.workers.values():
            worker.engine.check_integrity()
            worker.owner.check_integrity()
            worker.fetcher.check_integrity()
            assert worker.fetcher.num_quarantined == len(worker.withheld)
            if not worker.commands and not worker.results:
                leased = set(worker.engine._leases._leased)
                known = set(worker.owner.leased_requests)
                assert leased == known, f"{worker.worker_id}: owner {known}, engine {leased}"

    def check_contents(self) -> None:
        """The memory of every matchable block is what its hash promises."""
        for worker in self.workers.values():
            for block in worker.engine._pool.blocks():
                if block.block_hash is not None:
                    start = block.block_id * BLOCK_SIZE
                    values = worker.memory[start : start + BLOCK_SIZE].tolist()
                    assert values == self.router.contents[block.block_hash], (
                        f"{worker.worker_id}: block {block.block_id} holds something else"
                    )

    def check_nothing_leaked(self) -> None:
        for worker in self.workers.values():
            assert worker.owner.is_empty and worker.fetcher.is_empty, worker.worker_id
            assert not worker.live and not worker.imports and not worker.withheld
            assert worker.engine.is_empty, worker.engine.load()
            counts = worker.engine._pool.counts
            assert counts.free + counts.cached == NUM_BLOCKS, counts
            assert self._in_state(worker, BlockState.QUARANTINED) == []

    @staticmethod
    def _in_state(worker: Worker, state: BlockState) -> list[BlockId]:
        return [b.block_id for b in worker.engine._pool.blocks() if b.state is state]

    def _any(self) -> Worker:
        return self.rng.choice(list(self.workers.values()))

    def _break(self, reader_id: WorkerId, owner_id: WorkerId, stream: _Stream) -> None:
        self.events["broken streams"] += 1
        reader, owner = self.workers[reader_id], self.workers[owner_id]
        stream.is_up = False
        stream.clear()
        if self.rng.random() < 0.7:
            owner.apply(owner.owner.reader_gone(reader.reader_id))
        reader.fetcher.link_lost(owner_id, owner.epoch)

    def _restore(self, reader_id: WorkerId, owner_id: WorkerId, stream: _Stream) -> None:
        stream.is_up = True
        # At the latest now the owner learns that the old one is broken.
        reader, owner = self.workers[reader_id], self.workers[owner_id]
        owner.apply(owner.owner.reader_gone(reader.reader_id))
        reader.fetcher.link_restored(owner_id, owner.epoch)
