"""What the indexes are fed and asked: chains of block hashes that share a beginning.

Standard library alone: it also runs in the environments of peers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Workload:
    """Chains of `chain_blocks`, the first `shared_blocks` the same in all; each chain is on
    `num_holders` workers, told in events of `event_blocks`."""

    name: str
    num_entries: int
    """Distinct blocks, about."""
    num_holders: int = 1
    num_workers: int = 100
    chain_blocks: int = 512
    shared_blocks: int = 64
    event_blocks: int = 64
    seed: int = 0

    @property
    def num_chains(self) -> int:
        return (self.num_entries - self.shared_blocks) // (self.chain_blocks - self.shared_blocks)

    @property
    def num_distinct(self) -> int:
        own = self.num_chains * (self.chain_blocks - self.shared_blocks)
        return own + self.shared_blocks

    @property
    def num_stored(self) -> int:
        """Blocks in all events."""
        return self.num_chains * self.num_holders * self.chain_blocks

    def chain(self, number: int) -> bytes:
        """Joined hashes."""
        shared = random.Random(self.seed).randbytes(HASH_BYTES * self.shared_blocks)
        own = random.Random(self.seed + 1 + number)
        return shared + own.randbytes(HASH_BYTES * (self.chain_blocks - self.shared_blocks))

    def holders(self, number: int) -> Iterator[int]:
        """Worker numbers."""
        for copy in range(self.num_holders):
            yield (number + copy * (self.num_workers // self.num_holders)) % self.num_workers

    def events(self) -> Iterator[tuple[int, bytes, bytes]]:
        """(worker, hash of the parent block or nothing, joined hashes)."""
        stride = HASH_BYTES * self.event_blocks
        for number in range(self.num_chains):
            chain = self.chain(number)
            for worker in self.holders(number):
                for start in range(0, len(chain), stride):
                    parent = chain[max(0, start - HASH_BYTES) : start]
                    yield worker, parent, chain[start : start + stride]

    def prompts(self, kind: str, count: int) -> Iterator[bytes]:
        """`full`: chains that are held; `part`: their shared beginning alone; `none`: strangers."""
        rng = random.Random(self.seed - 1)
        for _ in range(count):
            chain = self.chain(rng.randrange(self.num_chains))
            if kind == "full":
                yield chain
            else:
                num_kept = HASH_BYTES * self.shared_blocks if kind == "part" else 0
                yield chain[:num_kept] + rng.randbytes(len(chain) - num_kept)


PROMPTS = ("full", "part", "none")
EXPECTED_BLOCKS = {"full": 512, "part": 64, "none": 0}
EXPECTED_WORKERS = {"full": 100, "part": 100, "none": 0}


def split(joined: bytes) -> list[bytes]:
    return [joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES)]


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
