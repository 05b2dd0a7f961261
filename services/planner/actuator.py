"""What a planner can do to the pools of a live deployment: the seam between deciding and doing.

Every call returns at once and only begins something; a later `workers()` shows how far it has come.
What was begun and failed shows as a worker that is gone again, with a line in the log of whoever
does it.

Does not know: why, how many, processes, replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from baton.core.worker_info import Role


class WorkerPhase(Enum):
    """STARTING → READY → DRAINING → gone; a starting one can be drained too."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class PlannedWorker:
    """One worker of the deployment, as it is now."""

    name: str
    """By which it is drained and changes its role; the same as long as it lives."""
    role: Role
    """The one it goes to, while it changes."""
    phase: WorkerPhase
    joined_s: float = float("-inf")
    """On the planner's clock: when it could take its first request, or its first in this role.
    Unknown for those that were there before, and for those that start."""
    is_settled: bool = False
    """It has just refused to change its role: not to be asked again for now."""


class PoolActuator(Protocol):
    """Called from one place, in turn. No call blocks, none raises for what a worker does later."""

    def workers(self) -> Sequence[PlannedWorker]:
        """All that use a device: starting and draining ones too."""
        ...

    def start(self, role: Role) -> None:
        """One more worker."""
        ...

    def drain(self, worker_name: str) -> None:
        """It takes no more requests, those it has are moved or finished, then it ends. A worker
        that is gone or draining already: nothing."""
        ...

    def change_role(self, worker_name: str, role: Role) -> None:
        """It goes on in the other pool, with its weights. Gone, draining or there already:
        nothing."""
        ...
