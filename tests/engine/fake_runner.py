"""Runners whose answers can be computed by hand.

The KV of a position is a fingerprint of all tokens up to it, made from the fingerprint stored at
the position before, as real KV is. So a block that is re-used, evicted or written too early shows
as a wrong token; `violations` says where it happened.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from baton.core.block import BlockId
from baton.engine.batch import Batch, SampledToken
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


class FakeRunner:
    """Computes fingerprints in a pool of slots and checks every slot it depends on."""

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.slots = [GARBAGE] * (num_blocks * block_size)
        self.violations: list[str] = []
        self.batches: list[list[tuple[str, int]]] = []
        self.fail_with: Exception | None = None
        self.block_pool: BlockPool | None = None
        """When set, only blocks being filled may be written."""

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        self.batches.append([(s.request_id, n) for s, n in batch.scheduled])
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise error
        return [self._compute(s, n, item.samples) for item in batch.scheduled for s, n in [item]]

    def read_blocks(self, block_ids: SequenceOf[BlockId]) -> list[list[int]]:
        size = self.block_size
        return [self.slots[b * size : (b + 1) * size] for b in block_ids]

    def write_blocks(self, block_ids: SequenceOf[BlockId], data: list[list[int]]) -> None:
        for block_id, values in zip(block_ids, data, strict=True):
            start = block_id * self.block_size
            self.slots[start : start + self.block_size] = values

    def _slot(self, sequence: Sequence, position: int) -> int:
        block_id = sequence.block_table[position // self.block_size]
        return block_id * self.block_size + position % self.block_size

    def _compute(self, sequence: Sequence, num_new: int, samples: bool) -> SampledToken | None:
        start = sequence.num_computed_tokens
        self._check_before(sequence, start, num_new)
        for position in range(start, start + num_new):
            parent = self.slots[self._slot(sequence, position - 1)] if position else 0
            value = fingerprint(parent, sequence.token_ids[position])
            self.slots[self._slot(sequence, position)] = value
        if not samples:
            return None
        return SampledToken(token_after(value, self.vocab_size), None)

    def _check_before(self, sequence: Sequence, start: int, num_new: int) -> None:
        expected = fingerprints(sequence.token_ids[:start])
        for position, value in enumerate(expected):
            if self.slots[self._slot(sequence, position)] != value:
                self.violations.append(f"{sequence.request_id}: wrong KV at {position} of {start}")
        if self.block_pool is None:
            return
        blocks = self.block_pool.blocks()
        for position in range(start, start + num_new):
            block = blocks[sequence.block_table[position // self.block_size]]
            if block.state is not BlockState.FILLING or block.ref_count != 1:
                self.violations.append(f"{sequence.request_id}: writes {block} at {position}")


class CountingRunner:
    """No KV at all: for measuring what the control side costs."""

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        return [SampledToken(7, None) if s.samples else None for s in batch.scheduled]
