"""A long random walk over two engines that hand requests to each other.

Pools are tiny, so preemption, waiting for blocks and eviction happen all the time. The fake KV
depends on every earlier position, so one block written or re-used too early gives a wrong token.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

from baton.core.block import BlockId
from baton.core.errors import InvalidRequest, Overloaded
from baton.core.request import FinishReason, TokenDelta, Work
from baton.core.structured import StructuredKind, StructuredSpec

Make = Callable[..., Any]
VOCAB = 23
EOS = 5
MAX_MODEL_LEN = 40
FAILURES = ("fail_with", "fail_wait_with")
"""At the launch of a step, or when its results are wanted."""


class MadeUp(InvalidRequest):
    """A grammar that turned out to be none."""


class AnyGrammar:
    """Stands for a compiled grammar; the fake runner asks none which tokens it allows."""

    digits = None

    @property
    def matcher(self) -> AnyGrammar:
        return self

    def deep_copy(self) -> AnyGrammar:
        return self


class SlowCompiler:
    """Grammars that come when the walk wants it, if at all."""

    def __init__(self, rng: random.Random) -> None:
        self._random = rng
        self._known: dict[StructuredSpec, Future[Any]] = {}
        self._open: list[Future[Any]] = []
        self.num_failed = 0

    def start(self, spec: StructuredSpec) -> Future[Any]:
        if spec not in self._known or self._random.random() < 0.2:
            self._known[spec] = Future()
            self._open.append(self._known[spec])
        return self._known[spec]

    def finish_one(self) -> None:
        waiting = [future for future in self._open if not future.done()]
        self._open = waiting
        if not waiting:
            return
        future = self._random.choice(waiting)
        if self._random.random() < 0.2:
            self.num_failed += 1
            future.set_exception(MadeUp("made up", param="structured"))
        else:
            future.set_result(AnyGrammar())


@dataclass
class Handoff:
    """The reader's view of one request that moves from `owner` to `reader`."""

    owner: Any
    reader: Any
    num_read_chunks: int = 0
    is_answered: bool = False
    is_released: bool = False


@dataclass
class World:
    """All engines, all requests, and what is legal to do with them next."""

    harnesses: list[Any]
    fingerprints: Callable[[Any], list[int]]
    random: random.Random
    prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    max_tokens: dict[str, int] = field(default_factory=dict)
    handoffs: dict[str, Handoff] = field(default_factory=dict)
    quarantined: list[tuple[Any, BlockId]] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    num_submitted: int = 0
    compiler: SlowCompiler | None = None

    def act(self) -> None:
        actions = (
            [self.step] * 40
            + [self.submit_generate] * 4
            + [self.submit_handoff] * 5
            + [self.read_chunk] * 12
            + [self.answer] * 8
            + [self.release] * 4
            + [self.late_write] * 3
            + [self.recover, self.cancel, self.give_up]
        )
        self.random.choice(actions)()
        for h in self.harnesses:
            h.check()
        if self.random.random() < 0.002:
            runner = self.random.choice(self.harnesses).runner
            setattr(runner, self.random.choice(FAILURES), RuntimeError("injected"))

    def new_prompt(self, kind: str) -> str:
        self.num_submitted += 1
        name = f"{kind}{self.num_submitted}"
        stem = self.random.choice([7, 11, 13])
        shared = [(stem * i + 1) % VOCAB for i in range(self.random.randint(0, 24))]
        own = [self.random.randrange(VOCAB) for _ in range(self.random.randint(1, 6))]
        self.prompts[name] = (*shared, *own)
        self.max_tokens[name] = self.random.randint(1, 24)
        return name

    def submit(self, h: Any, name: str, work: Work) -> bool:
        try:
            h.submit(
                name,
                self.prompts[name],
                work=work,
                max_tokens=self.max_tokens[name],
                eos_token_ids=(EOS,),
                is_cached=int(name[1:]) % 5 != 0,
                structured=self.new_structure(name),
            )
        except (Overloaded, MadeUp):
            self.events["overloaded"] += 1
            return False
        return True

    def new_structure(self, name: str) -> StructuredSpec | None:
        """Of every second request; some ask for the same."""
        if self.compiler is None or int(name[1:]) % 2:
            return None
        return StructuredSpec(StructuredKind.REGEX, f"x{int(name[1:]) % 40}")

    def submit_generate(self) -> None:
        name = self.new_prompt("g")
        if not self.submit(self.random.choice(self.harnesses), name, Work.GENERATE):
            del self.prompts[name]

    def submit_handoff(self) -> None:
        name = self.new_prompt("h")
        owner, reader = self.random.sample(self.harnesses, 2)
        has_owner = self.submit(owner, name, Work.PREFILL)
        has_reader = self.submit(reader, name, Work.DECODE)
        if not has_reader and has_owner:
            owner.engine.cancel(name)
        if not has_owner and has_reader:
            reader.engine.cancel(name)
        if has_owner and has_reader:
            self.handoffs[name] = Handoff(owner, reader)
        else:
            del self.prompts[name]

    def step(self) -> None:
        h = self.random.choice(self.harnesses)
        if not h.engine.has_work:
            assert not h.step().deltas, "a step without work said something"
            return
        h.step()
        self.events["steps"] += 1
        self.events["retiring"] += len(h.engine._scheduler.retiring)

    def cancel(self) -> None:
        live = [n for n, h in self.handoffs.items() if not h.is_released]
        live += [n for n in list(self.prompts)[-12:] if n.startswith("g")]
        if live:
            name = self.random.choice(live)
            for h in self.random.sample(self.harnesses, self.random.randint(1, 2)):
                h.engine.cancel(name)

    def waiting_for_answer(self) -> list[tuple[str, Handoff]]:
        return [
            (name, m)
            for name, m in self.handoffs.items()
            if not m.is_answered and m.reader.records[name].reservation is not None
        ]

    def read_chunk(self) -> None:
        for name, move in self.waiting_for_answer():
            chunks = move.owner.records[name].chunks
            if move.num_read_chunks < len(chunks) and not move.is_released:
                self.copy(name, move, chunks[move.num_read_chunks])
                move.num_read_chunks += 1
                return

    def copy(self, name: str, move: Handoff, chunk: Any) -> None:
        reservation = move.reader.records[name].reservation
        for i, source in enumerate(chunk.block_ids, start=chunk.first_block_index):
            if i >= reservation.num_cached_blocks:
                data = move.owner.runner.read_blocks([source])
                move.reader.runner.write_blocks([reservation.block_ids[i]], data)

    def answer(self) -> None:
        """Activate what has arrived in full, abandon what will never arrive."""
        for name, move in self.waiting_for_answer():
            owner = move.owner.records[name]
            is_whole = bool(owner.chunks) and owner.chunks[-1].is_last
            if is_whole and move.num_read_chunks == len(owner.chunks):
                move.is_answered = True
                move.reader.engine.activate(name, owner.chunks[-1].first_token)
                self.events["activated"] += 1
                return
            has_failed = owner.last is not None and not is_whole
            reader = move.reader.records[name]
            if has_failed or move.is_released or reader.last is not None:
                self.abandon(name, move)
                return

    def give_up(self) -> None:
        for name, move in self.waiting_for_answer()[:1]:
            self.abandon(name, move)

    def abandon(self, name: str, move: Handoff) -> None:
        move.is_answered = True
        reservation = move.reader.records[name].reservation
        missing = reservation.block_ids[reservation.num_cached_blocks :]
        unsettled = [b for b in missing if self.random.random() < 0.3]
        move.reader.engine.abandon(name, unsettled=unsettled)
        self.quarantined += [(move.reader, b) for b in unsettled]
        self.events["abandoned"] += 1
        self.events["quarantined"] += len(unsettled)

    def late_write(self) -> None:
        if self.quarantined:
            h, block_id = self.random.choice(self.quarantined)
            h.runner.write_blocks([block_id], [[-9] * h.runner.block_size])

    def recover(self) -> None:
        if self.quarantined:
            index = self.random.randrange(len(self.quarantined))
            h, block_id = self.quarantined.pop(index)
            h.engine.recover([block_id])

    def release(self) -> None:
        """The owner's side: leases end once the reader has answered, or run out before."""
        for name, move in self.handoffs.items():
            has_ended = move.owner.records[name].last is not None
            is_due = move.is_answered or self.random.random() < 0.02
            if has_ended and is_due and not move.is_released:
                self.check_leased_kv(name, move)
                move.is_released = True
                move.owner.engine.release_lease(name)
                return

    def check_leased_kv(self, name: str, move: Handoff) -> None:
        expected = self.fingerprints(self.prompts[name])
        blocks = move.owner.runner.read_blocks(move.owner.records[name].announced)
        stored = [value for values in blocks for value in values][: len(expected)]
        assert stored == expected[: len(stored)], f"{name}: KV changed under a lease"

    def settle(self) -> None:
        """Let everything end: hand-offs finish or are given up, leases and quarantine end."""
        for _ in range(20_000):
            if self.compiler is not None:
                self.compiler.finish_one()
            for h in self.harnesses:
                h.runner.fail_with = h.runner.fail_wait_with = None
                if h.engine.has_work:
                    h.step()
            self.read_chunk()
            self.answer()
            self.release()
            self.recover()
            if not self.quarantined and all(h.engine.is_empty for h in self.harnesses):
                break
            self.end_orphans()
        for h in self.harnesses:
            while h.engine.has_work:
                h.step()

    def end_orphans(self) -> None:
        """A decode whose owner has failed would wait for ever without its caller's cancel."""
        for name, move in self.handoffs.items():
            owner, reader = move.owner.records[name], move.reader.records[name]
            is_whole = bool(owner.chunks) and owner.chunks[-1].is_last
            if owner.last is not None and not is_whole and reader.last is None:
                move.reader.engine.cancel(name)


def check_outputs(world: World, expected: Callable[..., list[int]]) -> None:
    """Every output is the reference's, whole where the request ended by itself."""
    for name, prompt in world.prompts.items():
        records = [h.records[name] for h in world.harnesses if name in h.records]
        move = world.handoffs.get(name)
        if move is not None:
            records = [move.owner.records[name], move.reader.records[name]]
        token_ids = [t for record in records for t in record.token_ids]
        num_tokens = min(world.max_tokens[name], MAX_MODEL_LEN - len(prompt))
        reference = expected(prompt, num_tokens, VOCAB, (EOS,))
        last: TokenDelta | None = next((r.last for r in reversed(records) if r.last), None)
        if move is None:
            assert last is not None, f"{name} never ended"
        ended = {r.finish_reason for r in records if r.last}
        world.events.update(str(reason) for reason in ended)
        if ended & {FinishReason.STOP, FinishReason.LENGTH}:
            assert token_ids == reference, name
        else:
            assert token_ids == reference[: len(token_ids)], name


@pytest.mark.parametrize(
    ("seed", "num_blocks", "is_caching"),
    [(1, 10, True), (2, 12, True), (3, 24, True), (4, 10, False)],
)
def test_random_walk_gives_reference_outputs_and_leaks_nothing(
    make_harness: Make,
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
        "max_num_waiting": 6,
        "enable_prefix_caching": is_caching,
    }
    harnesses = [make_harness(num_blocks, **settings) for _ in range(2)]
    world = World(harnesses, fake_runner.fingerprints, random.Random(seed))
    # Launching ahead is where more can go wrong.
    num_steps = 5_000 * depth
    while world.events["steps"] < num_steps:
        world.act()
    world.settle()
    check_outputs(world, fake_runner.expected_output)
    for h in harnesses:
        assert_engine_empty(h.engine)
        if is_caching:
            assert h.engine.prefix_cache_stats.num_hit_tokens > 0
    happened = {"activated", "abandoned", "quarantined", "overloaded"}
    happened |= {str(FinishReason(reason)) for reason in ("stop", "length", "cancelled", "error")}
    assert happened <= set(world.events), world.events
    # Rows computed for sequences that had ended: only where steps are launched ahead.
    assert world.events["retiring"] > 100 if depth == 2 else world.events["retiring"] == 0
    assert sum(h.engine.load().num_preemptions for h in harnesses) > 20
    with pytest.raises(InvalidRequest, match="holds 40"):
        harnesses[0].submit("too-long", [1] * MAX_MODEL_LEN)


def test_random_walk_while_grammars_are_compiled(
    make_harness: Make,
    fake_runner: ModuleType,
    assert_engine_empty: Make,
    monkeypatch: pytest.MonkeyPatch,
    depth: int,
) -> None:
    """Every second request waits for one; some never get theirs, and end there."""
    monkeypatch.setattr("baton.engine.grammar.gate.PAUSE_S", 0.0)
    rng = random.Random(8)
    compiler = SlowCompiler(rng)
    settings = {
        "runner_vocab": VOCAB,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 9,
        "max_num_waiting": 6,
        "grammars": compiler,
    }
    harnesses = [make_harness(12, **settings) for _ in range(2)]
    world = World(harnesses, fake_runner.fingerprints, rng, compiler=compiler)
    while world.events["steps"] < 5_000:
        world.act()
        if rng.random() < 0.03:
            compiler.finish_one()
    world.settle()
    check_outputs(world, fake_runner.expected_output)
    for h in harnesses:
        assert_engine_empty(h.engine)
        assert not h.engine._grammars._waiting
    assert compiler.num_failed > 10
    assert {str(FinishReason.ERROR), str(FinishReason.STOP), "activated"} <= set(world.events)
    assert sum(h.engine.load().num_preemptions for h in harnesses) > 5
