"""What a worker's session tells, and in what states it is.

Does not know: how a session works.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Protocol

from baton.core.fabric import FabricReport
from baton.core.lifecycle import EngineUse
from services.router.workers.kv_feed import Held, KvChange, KvFault

if TYPE_CHECKING:
    from services.router.workers.session_client import WorkerSession


class SessionState(Enum):
    CONNECTING = "connecting"
    READY = "ready"
    LOST = "lost"
    CLOSED = "closed"


class SessionListener(Protocol):
    """Called on the event loop; must not block."""

    def on_ready(self, session: WorkerSession, held: Held) -> None:
        """Welcome has arrived. `session.kv_refusal` says why `held` is empty, if it was refused."""
        ...

    def on_role(self, session: WorkerSession) -> None:
        """`session.info` is of another role; all else of the session goes on."""
        ...

    def on_kv_event(self, session: WorkerSession, change: KvChange) -> None: ...

    def on_snapshot(self, session: WorkerSession, held: Held) -> None:
        """Replaces everything known of the worker's blocks; empty while a gap is repaired."""
        ...

    def on_kv_fault(self, session: WorkerSession, fault: KvFault) -> None:
        """Something was wrong with the worker's KV events."""
        ...

    def on_kv_refusal(self, session: WorkerSession, reason: str) -> None:
        """Nothing more of this session's KV events is used."""
        ...

    def on_session_fault(self, session: WorkerSession) -> None:
        """The session ends because of what the worker sent."""
        ...

    def on_late_use(self, session: WorkerSession, wire_id: str, use: EngineUse) -> None:
        """What a request that is over here has cost the worker."""
        ...

    def on_fabric(self, session: WorkerSession, report: FabricReport) -> None:
        """The worker has said how KV comes to it."""
        ...

    def on_lost(self, session: WorkerSession) -> None:
        """All requests of the session have been told."""
        ...
