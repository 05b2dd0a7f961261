"""At which layers of a prompt's last chunk its reader is told how far the step is. Pure.

A block is whole only after the last layer, so the blocks of the last chunk could be read only after
the prompt is computed. Told by layers, their reader follows the computation, and is left with the
last few layers at its end: each group halves what is left.

    32 layers, 4 groups     16 | 24 | 28 | 32
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from baton.core.request import Work
from baton.engine.batch import Batch, LayerMarks, ScheduledSequence
from baton.engine.handoff import LayersDone

LayerSink = Callable[[LayersDone], None]
"""Called on any thread; must not block or raise."""


def layer_groups(num_layers: int, num_groups: int) -> tuple[int, ...]:
    """Layers done at the end of each group, rising to `num_layers`; empty for no groups."""
    ends = {num_layers - (num_layers >> group) for group in range(1, num_groups)}
    return tuple(sorted(end for end in {*ends, num_layers} if end and num_groups > 0))


class LayerNotices:
    """Adds marks to the steps that compute a prompt's last chunk."""

    def __init__(self, *, num_layers: int, num_groups: int, min_tokens: int, block_size: int):
        """`min_tokens` of the chunk: what is smaller is read as fast at the end."""
        self._groups = layer_groups(num_layers, num_groups)
        self._min_tokens = min_tokens
        self._block_size = block_size
        self._fill_ids = itertools.count(1)
        self._sink: LayerSink | None = None

    def tell(self, sink: LayerSink) -> None:
        """From now on, of steps launched after this."""
        self._sink = sink

    def marked(self, batch: Batch) -> Batch:
        """The batch, with marks if it computes the last chunk of a prompt for another worker.

        Called right before the launch, once per step.
        """
        sink = self._sink
        if sink is None or not self._groups:
            return batch
        fills = [self._fill(s) for s in batch.scheduled if self._is_told(s)]
        if not fills:
            return batch

        def reached(num_layers: int) -> None:
            for fill in fills:
                sink(replace(fill, num_layers=num_layers))

        return replace(batch, layer_marks=LayerMarks(self._groups, reached))

    def _is_told(self, scheduled: ScheduledSequence) -> bool:
        is_last_chunk = scheduled.sequence.work is Work.PREFILL and scheduled.samples
        return is_last_chunk and scheduled.num_new_tokens >= self._min_tokens

    def _fill(self, scheduled: ScheduledSequence) -> LayersDone:
        sequence = scheduled.sequence
        sequence.fill_id = next(self._fill_ids)
        first = sequence.num_announced_blocks
        if sequence.num_in_flight_tokens:
            # The chunk before is announced when its step is over, ahead of any layer of this one.
            first = sequence.num_computed_tokens // self._block_size
        num_blocks = -(-sequence.num_tokens // self._block_size)
        block_ids = tuple(sequence.block_table[first:num_blocks])
        return LayersDone(sequence.request_id, sequence.fill_id, first, block_ids, 0)
