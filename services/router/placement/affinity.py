"""Where the last turn of each conversation ran. Bounded: the least recently used goes first.

A hint for placement and nothing more; a router that forgets, or has never known, places by what is
cached.
"""

from __future__ import annotations

from collections import OrderedDict

from baton.core.worker_info import WorkerId

Workers = tuple[WorkerId, ...]
MAX_KEY_LENGTH = 256
"""Clients choose the keys; longer ones are ignored."""


class SessionAffinity:
    """Keys are of one tenant: two tenants' equal keys are two conversations."""

    def __init__(self, max_sessions: int) -> None:
        self._max_sessions = max_sessions
        self._last: OrderedDict[tuple[str, str], Workers] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def last_workers(self, tenant: str, session_key: str) -> Workers:
        """Empty when the conversation is not known."""
        if not session_key:
            return ()
        return self._last.get((tenant, session_key), ())

    def note(self, tenant: str, session_key: str, workers: Workers) -> None:
        """A turn of the conversation has been sent to `workers`."""
        if not session_key or len(session_key) > MAX_KEY_LENGTH:
            return
        key = (tenant, session_key)
        self._last[key] = workers
        self._last.move_to_end(key)
        if len(self._last) > self._max_sessions:
            self._last.popitem(last=False)
