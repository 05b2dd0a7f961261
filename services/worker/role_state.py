"""In which pool a worker serves, and on its way into which. Pure: time is passed in.

    SERVING ── ask ──► ASKED ── leave ──► LEAVING ── no request is left ──► SERVING, next version
                         │ refused           │ time is up
                         └───────────────────┴──► SERVING as before
    any ── end ──► ENDING, for good

While it is LEAVING or ENDING the worker takes no work. Work carries the version that a router
placed it by: what was meant for an earlier role goes back, whatever the worker does by then.

Does not know: requests, sessions, settings, registries.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    RoleChangeOvertaken,
    RoleChangeRefused,
)
from baton.core.worker_info import Role


class RoleState(Enum):
    SERVING = "serving"
    ASKED = "asked"
    """Whether it may leave its pool is being found out; it works on meanwhile."""
    LEAVING = "leaving"
    ENDING = "ending"


class Asked(Enum):
    """What became of a wish for a role."""

    HAS_IT = "has it"
    STARTED = "started"
    JOINED = "joined"
    """The same change is under way; its outcome is this wish's too."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a change has ended. `error` None: the worker has its new role."""

    target: Role
    error: BatonError | None = None


class RoleMachine:
    """Of one worker."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.version = 1
        self.state = RoleState.SERVING
        self._target: Role | None = None
        self._deadline_s = 0.0
        self._overtaken: Outcome | None = None

    @property
    def target(self) -> Role | None:
        """None unless a change is under way."""
        return self._target

    @property
    def takes_work(self) -> bool:
        return self.state in (RoleState.SERVING, RoleState.ASKED)

    @property
    def is_changing(self) -> bool:
        return self.state in (RoleState.ASKED, RoleState.LEAVING)

    def is_current(self, version: int) -> bool:
        """Whether work placed by `version` is meant for the role that the worker has. 0: it may
        be."""
        return version in (0, self.version)

    def ask(self, target: Role, *, deadline_s: float) -> Asked:
        """Begin to change. Raises RoleChangeRefused, or RoleChangeOvertaken while ENDING."""
        if self.state is RoleState.ENDING:
            raise RoleChangeOvertaken("the worker is leaving for good; start another one")
        if self.is_changing:
            if target is self._target:
                return Asked.JOINED
            assert self._target is not None
            raise RoleChangeRefused(
                f"the worker is becoming a {self._target.value} worker; "
                "ask again when that change has ended"
            )
        if target is self.role:
            return Asked.HAS_IT
        self.state, self._target, self._deadline_s = RoleState.ASKED, target, deadline_s
        return Asked.STARTED

    def leave(self) -> None:
        """Nothing stands in the way: take no more work of the old role."""
        if self.state is RoleState.ASKED:
            self.state = RoleState.LEAVING

    def look(self, now_s: float, *, num_live: int) -> Outcome | None:
        """The end of the change under way, if it has come. `num_live`: requests still here."""
        if self.state is not RoleState.LEAVING:
            return None
        if num_live:
            if now_s < self._deadline_s:
                return None
            return self._stay(
                DeadlineExceeded(
                    f"{num_live} requests still ran when the time was up, and nowhere to move "
                    f"them; the worker stays in the {self.role.value} pool: ask again with more "
                    "time, or with room on the other workers"
                )
            )
        assert self._target is not None
        self.role, self.version = self._target, self.version + 1
        self.state, self._target = RoleState.SERVING, None
        return Outcome(self.role)

    def give_up(self, error: BatonError) -> Outcome | None:
        """Stay in the old role because of `error`; None where no change is under way."""
        return self._stay(error) if self.is_changing else None

    def end(self) -> None:
        """The worker leaves for good; a change under way is overtaken."""
        self._overtaken = self._overtaken or self.give_up(
            RoleChangeOvertaken("the worker began to leave for good while it changed its role")
        )
        self.state = RoleState.ENDING

    def take_overtaken(self) -> Outcome | None:
        """The change that `end` has found under way; once."""
        outcome, self._overtaken = self._overtaken, None
        return outcome

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        assert self.version >= 1
        assert (self._target is not None) == self.is_changing
        assert self._target is not self.role

    def _stay(self, error: BatonError) -> Outcome:
        assert self._target is not None
        target, self._target = self._target, None
        self.state = RoleState.SERVING
        return Outcome(target, error)
