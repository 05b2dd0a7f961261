"""API keys as several holders of the same book keep them, each of which may be the last one left.

A change carries a serial number that grows with time, and a revoked key stays in the book as
revoked. So books can be merged in any order, by whoever comes first: the later change of a key
wins, and a copy that has yet to hear of a revocation cannot bring the key back.

Pure. Bounded by `MAX_KEYS` and `MAX_REVOKED`. Does not know: who holds books, when they are merged.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from baton.core.errors import Overloaded
from services.router.shared.state import TenantRecord

MAX_KEYS = 100_000
MAX_REVOKED = 100_000
"""Revocations remembered; those longest ago are forgotten first."""


class KeyState(NamedTuple):
    serial: int
    record: TenantRecord | None
    """None of a key that has been revoked."""


class KeyBook:
    """`version` changes with the contents."""

    def __init__(self, now_ns: Callable[[], int] = time.time_ns) -> None:
        """`now_ns`: of a clock that holders on several machines have in common, more or less."""
        self._now_ns = now_ns
        self._keys: dict[str, KeyState] = {}
        self._revoked: dict[str, KeyState] = {}
        self._serial = 0
        self.version = 0

    def __len__(self) -> int:
        """Revoked ones included."""
        return len(self._keys) + len(self._revoked)

    def read(self, key_hash: str) -> TenantRecord | None:
        state = self._keys.get(key_hash)
        return None if state is None else state.record

    def write(self, key_hash: str, record: TenantRecord) -> KeyState:
        """Raises Overloaded."""
        if key_hash not in self._keys and len(self._keys) >= MAX_KEYS:
            raise Overloaded(f"{MAX_KEYS} keys are stored already; remove some, or use Redis")
        return self._change(key_hash, record)

    def revoke(self, key_hash: str) -> KeyState | None:
        """None where there is no such key."""
        return self._change(key_hash, None) if key_hash in self._keys else None

    def live(self) -> dict[str, TenantRecord]:
        """A copy."""
        return {k: s.record for k, s in self._keys.items() if s.record is not None}

    def states(self) -> dict[str, KeyState]:
        """A copy, revoked keys included."""
        return {**self._keys, **self._revoked}

    def merge(self, states: Mapping[str, KeyState]) -> None:
        """Take over the later change of each key; of two at the same time, the revocation."""
        for key_hash, state in states.items():
            known = self._keys.get(key_hash) or self._revoked.get(key_hash)
            if known is None or _rank(state) > _rank(known):
                self._set(key_hash, state)
        self._forget_oldest()

    def _change(self, key_hash: str, record: TenantRecord | None) -> KeyState:
        state = KeyState(max(self._serial + 1, self._now_ns()), record)
        self._set(key_hash, state)
        self._forget_oldest()
        return state

    def _set(self, key_hash: str, state: KeyState) -> None:
        self._keys.pop(key_hash, None)
        self._revoked.pop(key_hash, None)
        if state.record is None:
            self._revoked[key_hash] = state
        elif len(self._keys) < MAX_KEYS:
            self._keys[key_hash] = state
        self._serial = max(self._serial, state.serial)
        self.version += 1

    def _forget_oldest(self) -> None:
        """Once for all of a merge: each time is a look at all revocations."""
        num_over = len(self._revoked) - MAX_REVOKED
        if num_over > 0:
            for key_hash in heapq.nsmallest(
                num_over, self._revoked, key=lambda k: self._revoked[k].serial
            ):
                del self._revoked[key_hash]


def _rank(state: KeyState) -> tuple[int, bool]:
    return state.serial, state.record is None
