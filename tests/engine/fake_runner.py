"""Runners whose answers can be computed by hand.

The KV of a position is a fingerprint of all tokens up to it, made from the fingerprint stored at
the position before, as real KV is. So a block that is re-used, evicted or written too early shows
as a wrong token; `violations` says where it happened.

With two steps in flight the runner behaves as a device does that computes on its own: the values of
a launched step are in its own order at once, pending tokens included, but memory shows garbage to
everybody else, and results come, only when the step is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from baton.core.block import BlockId
from baton.core.request import RequestId
from baton.engine.batch import Batch, CompletedStep, SampledToken, ScheduledSequence, SequenceSlice
from baton.engine.block_pool import BlockPool
from baton.engine.block_state import BlockState
from baton.engine.sequence import Sequence

_MASK = (1 << 61) - 1
GARBAGE = -1


def fingerprint(parent: int, token_id: int) -> int:
    return (parent * 6364136223846793005 + token_id * 1442695040888963407 + 97) & _MASK


def fingerprints(token_ids: SequenceOf[int]) -> list[int]:
    chain, parent = [], 0
    for token_id in token_ids:
        parent = fingerprint(parent, token_id)
        chain.append(parent)
    return chain


def token_after(value: int, vocab_size: int) -> int:
    return (value >> 17) % vocab_size


def expected_output(
    prompt: SequenceOf[int], num_tokens: int, vocab_size: int, stop_ids: SequenceOf[int] = ()
) -> list[int]:
    """The output of an uninterrupted greedy run, without the stop token."""
    output: list[int] = []
    value = fingerprints(prompt)[-1]
    while len(output) < num_tokens:
        token_id = token_after(value, vocab_size)
        if token_id in stop_ids:
            break
        output.append(token_id)
        value = fingerprint(value, token_id)
    return output


class FakeStep:
    """A launched step: what it writes, and what it will say."""

    def __init__(self, runner: FakeRunner, batch: Batch) -> None:
        self._runner = runner
        self.index = len(runner.batches)
        self.batch = batch
        self.values: dict[int, int] = {}
        """By slot."""
        self.tables: list[tuple[Sequence, set[BlockId]]] = []
        """Blocks that the step writes for each sequence."""
        self.results: list[SampledToken | None] = []
        self.fail_with: Exception | None = None

    def wait(self) -> list[SampledToken | None]:
        self._runner.events.append(("wait", self.index))
        self._runner.end(self)
        if self.fail_with is not None:
            raise self.fail_with
        return self.results


class FakeRunner:
    """Computes fingerprints in a pool of slots and checks every slot it depends on."""

    def __init__(
        self, num_blocks: int, block_size: int, vocab_size: int, *, max_in_flight: int = 1
    ) -> None:
        self.max_in_flight = max_in_flight
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.slots = [GARBAGE] * (num_blocks * block_size)
        """Memory as everybody but the device sees it."""
        self.violations: list[str] = []
        self.batches: list[list[tuple[str, int]]] = []
        self.events: list[tuple[str, int]] = []
        """Launches and waits by index of the batch."""
        self.fail_with: Exception | None = None
        """Raised by the next launch."""
        self.fail_wait_with: Exception | None = None
        """Raised when the step that is launched next is waited for."""
        self.block_pool: BlockPool | None = None
        """When set, only blocks being filled may be written."""
        self._in_flight: list[FakeStep] = []
        self._sampled: dict[RequestId, int] = {}
        """Tokens of the last launch."""

    def launch(self, batch: Batch) -> FakeStep:
        step = FakeStep(self, batch)
        self.events.append(("launch", step.index))
        self.batches.append([(s.request_id, n) for s, n in batch.scheduled])
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise error
        step.fail_with, self.fail_wait_with = self.fail_wait_with, None
        if len(self._in_flight) >= self.max_in_flight:
            self.violations.append(f"{len(self._in_flight) + 1} steps in flight")
        self._in_flight.append(step)
        step.results = [self._compute(step, scheduled) for scheduled in batch.scheduled]
        self._sampled = {
            scheduled.sequence.request_id: result.token_id
            for scheduled, result in zip(batch.scheduled, step.results, strict=True)
            if result is not None
        }
        return step

    def end(self, step: FakeStep) -> None:
        """The step's values come to light, in blocks that nobody else may have got meanwhile."""
        if self._in_flight.pop(0) is not step:
            self.violations.append("a step was waited for out of order")
        for sequence, written in step.tables:
            for block_id in written:
                self._check_written(sequence, block_id, "after the step")
        if step.fail_with is None:
            for slot, value in step.values.items():
                self.slots[slot] = value

    def is_in_flight(self, index: int) -> bool:
        return any(step.index == index for step in self._in_flight)

    def read_blocks(self, block_ids: SequenceOf[BlockId]) -> list[list[int]]:
        size = self.block_size
        return [self.slots[b * size : (b + 1) * size] for b in block_ids]

    def write_blocks(self, block_ids: SequenceOf[BlockId], data: list[list[int]]) -> None:
        """As a read from another worker lands: in no order with the device's work."""
        in_use = {b for step in self._in_flight for _, written in step.tables for b in written}
        for block_id, values in zip(block_ids, data, strict=True):
            if block_id in in_use:
                self.violations.append(f"a step in flight writes to {block_id} too")
            start = block_id * self.block_size
            self.slots[start : start + self.block_size] = values

    def _slot(self, sequence: Sequence, position: int) -> int:
        block_id = sequence.block_table[position // self.block_size]
        return block_id * self.block_size + position % self.block_size

    def _load(self, slot: int) -> int:
        """As the device sees it, which has done all that was launched."""
        for step in reversed(self._in_flight):
            if slot in step.values:
                return step.values[slot]
        return self.slots[slot]

    def _compute(self, step: FakeStep, scheduled: ScheduledSequence) -> SampledToken | None:
        sequence = scheduled.sequence
        sliced = SequenceSlice.of(scheduled, self.block_size)
        start, new = sliced.first_position, list(sliced.token_ids)
        if sliced.has_pending_token:
            new[-1] = self._sampled[sequence.request_id]
        self._check_read(sequence, start)
        written = set(sliced.block_table[start // self.block_size :])
        for block_id in written:
            self._check_written(sequence, block_id, "at the launch")
        step.tables.append((sequence, written))
        for position, token_id in enumerate(new, start):
            slot = self._slot(sequence, position)
            parent = self._load(self._slot(sequence, position - 1)) if position else 0
            value = fingerprint(parent, token_id)
            step.values[slot] = value
            self.slots[slot] = GARBAGE
        if not sliced.samples:
            return None
        return SampledToken(token_after(value, self.vocab_size), None)

    def _check_read(self, sequence: Sequence, start: int) -> None:
        """What comes before the new tokens: all known, because only the last one can be pending."""
        for position, value in enumerate(fingerprints(sequence.token_ids[:start])):
            if self._load(self._slot(sequence, position)) != value:
                self.violations.append(f"{sequence.request_id}: wrong KV at {position} of {start}")

    def _check_written(self, sequence: Sequence, block_id: BlockId, when: str) -> None:
        """A block that is being written belongs to one sequence and is no more than half done."""
        if block_id not in sequence.block_table:
            self.violations.append(f"{sequence.request_id}: lost block {block_id} {when}")
        if self.block_pool is None:
            return
        block = self.block_pool.blocks()[block_id]
        if block.state is not BlockState.FILLING or block.ref_count != 1:
            self.violations.append(f"{sequence.request_id}: writes {block} {when}")


class CountingRunner:
    """No KV at all: for measuring what the control side costs."""

    max_in_flight = 1

    def launch(self, batch: Batch) -> CompletedStep:
        return CompletedStep(
            [SampledToken(7, None) if s.samples else None for s in batch.scheduled]
        )
