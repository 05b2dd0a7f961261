"""Rank 0's steps, run by all ranks. Implements `batch.Runner`.

Not known here: processes, devices.
"""

from __future__ import annotations

from collections.abc import Callable

from baton.engine.batch import Batch, LaunchedStep, SampledToken, slices
from baton.engine.tensor_parallel.group import RankGroup
from baton.engine.tensor_parallel.rank_runner import RankRunner


class TensorParallelRunner:
    """Tells the other ranks what rank 0 is about to compute.

    Whatever rank 0 raises leaves the ranks out of step, so it ends the group; `Unavailable` says
    why, for this step and all that follow.
    """

    def __init__(
        self,
        runner: RankRunner,
        group: RankGroup,
        *,
        block_size: int,
        num_threads: Callable[[], int],
    ) -> None:
        """`runner` is rank 0's own; `num_threads` see `messages.Step`."""
        self._runner = runner
        self._group = group
        self._block_size = block_size
        self._num_threads = num_threads

    @property
    def max_in_flight(self) -> int:
        return self._runner.max_in_flight

    def launch(self, batch: Batch) -> LaunchedStep:
        group = self._group
        step_slices = slices(batch, self._block_size)
        group.send_step(step_slices, num_threads=self._num_threads())
        try:
            step = self._runner.launch_slices(batch, step_slices)
        except Exception as error:
            raise group.lost(error) from error
        return _GroupStep(step, group)


class _GroupStep:
    __slots__ = ("_group", "_step")

    def __init__(self, step: LaunchedStep, group: RankGroup) -> None:
        self._step = step
        self._group = group

    def wait(self) -> list[SampledToken | None]:
        try:
            results = self._step.wait()
        except Exception as error:
            raise self._group.lost(error) from error
        self._group.step_ended()
        # What was computed while the group was lost means nothing.
        self._group.check()
        return results
