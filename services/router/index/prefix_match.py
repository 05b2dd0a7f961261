"""What a match in the prefix index says of all workers at once.

Does not know: where the lengths come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baton.core.tier import Tier
from baton.core.worker_info import WorkerId

NUM_TIERS = len(Tier)


@dataclass(frozen=True, slots=True, eq=False)
class PrefixMatch:
    """How much of one prompt each worker holds."""

    lengths: NDArray[np.int32]
    """[num_tiers, num_slots]. Row t: leading blocks of the prompt that the worker of that slot
    holds in tier t or a better one, so no row is below the one before it. Not to be written to."""
    slots: Mapping[WorkerId, int]
    """The index's own table of slots, live."""

    @property
    def longest(self) -> int:
        """Leading blocks that anybody holds."""
        lengths = self.lengths
        return int(lengths.item(lengths.argmax())) if lengths.size else 0

    def num_blocks(self, worker_id: WorkerId, tier: Tier = Tier.DISK) -> int:
        """Leading blocks that `worker_id` holds in `tier` or a better one."""
        slot = self.slots.get(worker_id)
        if slot is None or slot >= self.lengths.shape[1]:
            return 0
        return int(self.lengths[tier, slot])

    def by_worker(self, tier: Tier = Tier.DISK) -> dict[WorkerId, int]:
        """Lengths of the workers that hold anything. For small clusters and tests."""
        return {w: n for w in self.slots if (n := self.num_blocks(w, tier))}
