"""What a worker that computes nothing remembers of prompts, and the events that say so."""

from __future__ import annotations

from collections import OrderedDict

from baton.core.block import HASH_BYTES
from baton.rpc.v1 import worker_pb2 as pb
from bench.router.fake_worker import BLOCK_SIZE


class BlockCache:
    """Blocks by their hashes, the least recently used dropped first, with the events that tell of
    it. Routers join while it is empty."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        self._events: list[pb.KvEvent] = []
        self._num_told = 0

    def match(self, block_hashes: bytes, num_tokens: int) -> int:
        """Leading tokens that are there; the last one is always computed."""
        num_cached = 0
        for block in _split(block_hashes):
            if block not in self._blocks:
                break
            self._blocks.move_to_end(block)
            num_cached += BLOCK_SIZE
        return min(num_cached, num_tokens - 1)

    def store(self, block_hashes: bytes) -> None:
        stored, removed = [], []
        if not self._num_blocks:
            return
        # The end of a prompt goes first.
        for block in reversed(_split(block_hashes)[: self._num_blocks]):
            if block not in self._blocks:
                stored.append(block)
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._num_blocks:
            removed.append(self._blocks.popitem(last=False)[0])
        if removed:
            self._events.append(pb.KvEvent(removed=b"".join(removed)))
        if stored:
            self._events.append(pb.KvEvent(stored=b"".join(reversed(stored))))

    def take_events(self) -> tuple[int, list[pb.KvEvent]]:
        """(number of the first, those not told yet)."""
        first, events = self._num_told + 1, self._events
        self._num_told += len(events)
        self._events = []
        return first, events


def _split(block_hashes: bytes) -> list[bytes]:
    return [block_hashes[i : i + HASH_BYTES] for i in range(0, len(block_hashes), HASH_BYTES)]
