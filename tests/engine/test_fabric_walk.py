"""A long random walk over engines that take running requests over from each other, fetch each
other's prefixes and save their caches, with little memory and steps that fail.

The part of the workers is played here: every lease may end early, every read may be given up, and
what was given up may still be written to late. The fake KV depends on every earlier position, so
a block that changes hands too early gives a wrong token.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

from baton.core.block import BlockHash, BlockId, chain_hashes
from baton.core.errors import InvalidRequest, NotFound, Overloaded
from baton.core.request import FinishReason, Work

Make = Callable[..., Any]
VOCAB = 23
EOS = 22
MAX_MODEL_LEN = 64
FAILURES = ("fail_with", "fail_wait_with")


@dataclass
class Request:
    """What a router knows of one request."""

    prompt: tuple[int, ...]
    max_tokens: int
    is_cached: bool
    home: Any
    """The engine that generates it."""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass
class Move:
    """One takeover, from the workers' side."""

    name: str
    owner: Any
    reader: Any
    is_started: bool = False
    is_freezing: bool = False
    num_read: int = 0


@dataclass
class Fetch:
    """One import, and the lease it is read under; no owner: it comes from nowhere."""

    import_id: str
    reader: Any
    reservation: Any
    owner: Any
    sources: tuple[BlockId, ...]
    hashes: list[BlockHash]
    num_read: int = 0


@dataclass
class World:
    harnesses: list[Any]
    fake: ModuleType
    root: BlockHash
    random: random.Random
    requests: dict[str, Request] = field(default_factory=dict)
    moves: dict[str, Move] = field(default_factory=dict)
    fetches: list[Fetch] = field(default_factory=list)
    saves: list[tuple[Any, list[BlockId]]] = field(default_factory=list)
    quarantined: list[tuple[Any, BlockId]] = field(default_factory=list)
    tokens_of: dict[BlockHash, tuple[int, ...]] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    num_ids: int = 0

    def act(self) -> None:
        actions = (
            [self.step] * 30
            + [self.submit] * 2
            + [self.move] * 3
            + [self.advance_move] * 50
            + [self.fetch] * 3
            + [self.advance_fetch] * 10
            + [self.save, self.end_save] * 3
            + [self.late_write] * 2
            + [self.recover, self.cancel, self.give_up]
        )
        self.random.choice(actions)()
        for h in self.harnesses:
            h.check()
        if self.random.random() < 0.002:
            runner = self.random.choice(self.harnesses).runner
            setattr(runner, self.random.choice(FAILURES), RuntimeError("injected"))

    def new_id(self, kind: str) -> str:
        self.num_ids += 1
        return f"{kind}{self.num_ids}"

    def submit(self) -> None:
        stem = self.random.choice([7, 11, 13])
        shared = [(stem * i + 1) % VOCAB for i in range(self.random.randint(0, 24))]
        own = [self.random.randrange(VOCAB) for _ in range(self.random.randint(1, 6))]
        request = Request(
            (*shared, *own),
            self.random.randint(8, 36),
            self.random.random() < 0.8,
            self.random.choice(self.harnesses),
        )
        name = self.new_id("r")
        try:
            self.submit_to(request.home, name, request, Work.GENERATE)
        except Overloaded:
            return
        self.requests[name] = request
        for end in range(4, len(request.prompt) + 1, 4):
            hashes = chain_hashes(self.root, request.prompt[:end], 4)
            self.tokens_of[hashes[-1]] = request.prompt[:end]

    def submit_to(self, h: Any, name: str, request: Request, work: Work) -> None:
        earlier = h.records.pop(name, None)
        try:
            self.submit_new(h, name, request, work)
        except (Overloaded, InvalidRequest):
            if earlier is not None:
                h.records[name] = earlier
            raise

    def submit_new(self, h: Any, name: str, request: Request, work: Work) -> None:
        h.submit(
            name,
            request.prompt,
            work=work,
            max_tokens=request.max_tokens,
            eos_token_ids=(EOS,),
            is_cached=request.is_cached,
            output_token_ids=tuple(request.tokens),
        )

    def live(self) -> list[str]:
        return [n for n, r in self.requests.items() if r.finish_reason is None]

    def step(self) -> None:
        h = self.random.choice(self.harnesses)
        if not h.engine.has_work:
            assert not h.step().says_something, "a step without work said something"
            return
        self.step_one(h)
        self.events["steps"] += 1

    def step_one(self, h: Any) -> None:
        output = h.step()
        for delta in output.deltas:
            request = self.requests[delta.request_id]
            if request.home is not h:
                assert not delta.token_ids, "a reader generates before it has taken over"
                continue
            assert delta.first_index == len(request.tokens), "a token is missing or came twice"
            request.tokens += delta.token_ids
            if delta.timeline is not None:
                assert delta.finish_reason is not None
                request.finish_reason = delta.finish_reason
        for name in output.handovers_ended:
            self.events["ended by itself"] += 1
            if h.records[name].last is None:
                self.events["preempted"] += 1
            if name in self.moves:
                self.drop(self.moves[name])

    def move(self) -> None:
        names = [n for n in self.live() if n not in self.moves]
        running = [n for n in names if self.requests[n].tokens]
        if not names:
            return
        is_likely = running and self.random.random() < 0.95
        name = self.random.choice(running if is_likely else names)
        request = self.requests[name]
        reader = self.random.choice([h for h in self.harnesses if h is not request.home])
        if any(delta.request_id == name for delta in reader.engine._output.deltas):
            # The end of an earlier attempt is not told yet.
            return
        try:
            self.submit_to(reader, name, request, Work.TAKEOVER)
        except (Overloaded, InvalidRequest):
            self.events["refused"] += 1
            return
        self.moves[name] = Move(name, request.home, reader)

    def advance_move(self) -> None:
        ready = [m for m in self.moves.values() if m.reader.records[m.name].reservation]
        if not ready:
            return
        move = self.random.choice(ready)
        record = move.reader.records[move.name]
        if record.last is not None:
            self.drop(move)
            return
        if not move.is_started:
            known = len(move.reader.engine._sequences[move.name].request.output_token_ids)
            try:
                move.owner.records[move.name].chunks = []
                move.owner.engine.start_handover(move.name, num_known_tokens=known)
            except NotFound:
                self.events["not started"] += 1
                self.drop(move)
                return
            move.is_started = True
            return
        announced = move.owner.records[move.name].announced
        if len(announced) > len(record.reservation.block_ids):
            self.events["outgrown"] += 1
            self.drop(move)
        elif move.num_read < len(announced):
            self.read(move, announced)
        elif not move.is_freezing:
            move.is_freezing = True
            try:
                move.owner.engine.freeze(move.name)
            except NotFound:
                self.events["not frozen"] += 1
                self.drop(move)
        else:
            chunks = move.owner.records[move.name].chunks
            if chunks and chunks[-1].is_last:
                self.complete(move, chunks[-1])

    def read(self, move: Move, announced: list[BlockId]) -> None:
        index = move.num_read
        move.num_read += 1
        reservation = move.reader.records[move.name].reservation
        if index >= reservation.num_cached_blocks:
            data = move.owner.runner.read_blocks([announced[index]])
            move.reader.runner.write_blocks([reservation.block_ids[index]], data)

    def complete(self, move: Move, last: Any) -> None:
        if self.random.random() < 0.3:
            self.events["frozen and resumed"] += 1
            self.drop(move)
            return
        name = move.name
        request = self.requests[name]
        unknown = last.first_token
        owner = move.owner
        blocks = owner.runner.read_blocks(owner.records[name].announced)
        values = [value for block in blocks for value in block]
        known = [*request.prompt, *request.tokens[: unknown.first_index], *unknown.token_ids]
        assert values[: len(known) - 1] == self.fake.fingerprints(known)[:-1], "KV changed"
        try:
            owner.engine.finish_handover(name)
        except NotFound:
            self.events["not finished"] += 1
            self.drop(move)
            return
        while owner.records[name].last is None:
            self.step_handed_over(owner, name)
        assert [*request.prompt, *request.tokens] == known
        request.home = move.reader
        move.reader.engine.activate(name, unknown)
        del self.moves[name]
        self.events["taken over"] += 1

    def step_handed_over(self, owner: Any, name: str) -> None:
        """The owner tells the end without a reason; nothing of it is news to the router."""
        home, self.requests[name].home = self.requests[name].home, None
        before = len(owner.records[name].deltas)
        self.step_one(owner)
        for delta in owner.records[name].deltas[before:]:
            assert not delta.token_ids
            assert delta.finish_reason is None
            assert delta.first_index == len(self.requests[name].tokens)
        self.requests[name].home = home

    def drop(self, move: Move) -> None:
        """Both sides forget the takeover, in whatever state it is."""
        del self.moves[move.name]
        move.owner.engine.release_lease(move.name)
        if move.owner.engine.has_work and self.random.random() < 0.3:
            # The two commands need not come to the engine between the same two steps.
            self.step_one(move.owner)
        move.owner.engine.resume(move.name)
        record = move.reader.records[move.name]
        if record.reservation is None:
            move.reader.engine.cancel(move.name)
            return
        missing = record.reservation.block_ids[record.reservation.num_cached_blocks :]
        move.reader.engine.abandon(move.name, unsettled=self.unsettled(move.reader, missing))
        self.events["given up"] += 1

    def unsettled(self, h: Any, block_ids: tuple[BlockId, ...]) -> list[BlockId]:
        chosen = [b for b in block_ids if self.random.random() < 0.2]
        self.quarantined += [(h, b) for b in chosen]
        return chosen

    def give_up(self) -> None:
        if self.moves:
            self.drop(self.random.choice(list(self.moves.values())))

    def cancel(self) -> None:
        names = self.live()
        if names:
            name = self.random.choice(names)
            for h in self.harnesses:
                h.engine.cancel(name)

    def fetch(self) -> None:
        if not self.tokens_of:
            return
        tokens = self.random.choice(list(self.tokens_of.values()))
        hashes = chain_hashes(self.root, tokens, 4)
        owner, reader = self.random.sample(self.harnesses, 2)
        import_id = self.new_id("f")
        reservation = reader.engine.reserve_import(import_id, hashes)
        if reservation is None:
            return
        self.events["imports"] += 1
        self.events["partial imports"] += len(reservation.block_ids) < len(hashes)
        sources = owner.engine.lease_prefix(import_id, hashes)
        self.fetches.append(Fetch(import_id, reader, reservation, owner, sources, hashes))

    def advance_fetch(self) -> None:
        if not self.fetches:
            return
        fetch = self.random.choice(self.fetches)
        num_blocks = min(len(fetch.sources), len(fetch.reservation.block_ids))
        if fetch.num_read < num_blocks and self.random.random() < 0.95:
            index = fetch.num_read
            if index >= fetch.reservation.num_cached_blocks:
                data = fetch.owner.runner.read_blocks([fetch.sources[index]])
                fetch.reader.runner.write_blocks([fetch.reservation.block_ids[index]], data)
            fetch.num_read += 1
            return
        self.fetches.remove(fetch)
        fetch.owner.engine.release_lease(fetch.import_id)
        num_valid = max(fetch.num_read, fetch.reservation.num_cached_blocks)
        if self.random.random() < 0.7:
            fetch.reader.engine.finish_import(fetch.import_id, num_blocks=num_valid)
            self.events["imported"] += 1
            return
        missing = fetch.reservation.block_ids[fetch.reservation.num_cached_blocks :]
        unsettled = self.unsettled(fetch.reader, missing)
        fetch.reader.engine.abandon_import(fetch.import_id, unsettled=unsettled)

    def save(self) -> None:
        h = self.random.choice(self.harnesses)
        taken = h.engine.take_unsaved(self.random.randint(1, 6))
        if not taken:
            return
        self.events["saves"] += 1
        for block_hash, block_id in taken:
            tokens = self.tokens_of.get(block_hash)
            if tokens is not None:
                stored = h.runner.read_blocks([block_id])[0]
                assert stored == self.fake.fingerprints(tokens)[-4:], "saved something else"
        self.saves.append((h, [block_id for _, block_id in taken]))

    def end_save(self) -> None:
        if self.saves:
            h, block_ids = self.saves.pop(self.random.randrange(len(self.saves)))
            h.engine.release_saved(block_ids, is_saved=self.random.random() < 0.8)

    def late_write(self) -> None:
        if self.quarantined:
            h, block_id = self.random.choice(self.quarantined)
            h.runner.write_blocks([block_id], [[-9] * 4])

    def recover(self) -> None:
        if self.quarantined:
            h, block_id = self.quarantined.pop(self.random.randrange(len(self.quarantined)))
            h.engine.recover([block_id])

    def settle(self) -> None:
        """Let everything end."""
        for _ in range(5_000):
            for h in self.harnesses:
                h.runner.fail_with = h.runner.fail_wait_with = None
                if h.engine.has_work:
                    self.step_one(h)
            self.advance_move()
            self.advance_fetch()
            self.end_save()
            self.recover()
            is_over = not (self.moves or self.fetches or self.saves or self.quarantined)
            if is_over and all(h.engine.is_empty for h in self.harnesses):
                break
        for h in self.harnesses:
            while h.engine.has_work:
                self.step_one(h)


@pytest.mark.parametrize(
    ("seed", "num_blocks", "is_caching"),
    [(1, 26, True), (2, 34, True), (3, 48, True), (4, 30, False)],
)
def test_random_walk_of_takeovers_imports_and_saves(
    make_harness: Make,
    harness: ModuleType,
    fake_runner: ModuleType,
    assert_engine_empty: Make,
    seed: int,
    num_blocks: int,
    is_caching: bool,
    depth: int,
) -> None:
    settings = {
        "runner_vocab": VOCAB,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 9,
        "max_num_waiting": 10,
        "enable_prefix_caching": is_caching,
    }
    harnesses = [make_harness(num_blocks, **settings) for _ in range(3)]
    world = World(harnesses, fake_runner, harness.ROOT, random.Random(seed))
    while world.events["steps"] < 1_250:
        world.act()
    world.settle()
    ended: Counter[FinishReason | None] = Counter()
    for name, request in world.requests.items():
        num_tokens = min(request.max_tokens, MAX_MODEL_LEN - len(request.prompt))
        reference = fake_runner.expected_output(request.prompt, num_tokens, VOCAB, (EOS,))
        ended[request.finish_reason] += 1
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert request.tokens == reference, name
        else:
            assert request.tokens == reference[: len(request.tokens)], name
    for h in harnesses:
        assert_engine_empty(h.engine)
    assert set(ended) == set(FinishReason)
    happened = {"taken over", "frozen and resumed", "ended by itself", "given up"}
    if is_caching:
        happened |= {"imported", "partial imports", "saves"}
    assert happened <= set(+world.events), world.events
    assert world.events["taken over"] > 10, world.events
