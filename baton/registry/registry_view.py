"""What a reader of a remote registry believes, also across its failures.

A registry that was away may come back having forgotten everyone, or with leases that ended while
nobody could renew them. Workers take a moment to announce themselves again, so after an
interruption those known before stay in the view for `hold_s`. Whether they live their sessions say.

Pure: time is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping

from baton.core.worker_info import WorkerId, WorkerInfo

Workers = Mapping[WorkerId, WorkerInfo]


class RegistryView:
    """The last known workers."""

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._workers: dict[WorkerId, WorkerInfo] = {}
        self._missing: dict[WorkerId, WorkerInfo] = {}
        """Known before the last interruption and not seen since."""
        self._generation: bytes | None = None
        self._was_away = False
        self._hold_until_s = float("-inf")

    @property
    def workers(self) -> Workers:
        return dict(self._workers)

    @property
    def is_known(self) -> bool:
        """The registry was read at least once."""
        return self._generation is not None

    def failed(self) -> None:
        """The registry could not be read."""
        self._was_away = True

    def update(self, generation: bytes, workers: Workers, now_s: float) -> Workers:
        """The registry was read. `generation` changes when it has lost its data."""
        is_interrupted = self._was_away or generation != self._generation
        if self.is_known and is_interrupted:
            self._missing = dict(self._workers)
            self._hold_until_s = now_s + self._hold_s
        self._was_away = False
        self._generation = generation
        if now_s >= self._hold_until_s:
            self._missing.clear()
        for worker_id in workers:
            self._missing.pop(worker_id, None)
        self._workers = {**self._missing, **workers}
        return self.workers
