"""The registry seam between workers, which announce themselves, and routers, which watch.

A registration is a lease: it vanishes unless renewed, so a worker that dies without a word is
gone after its time to live. A worker id names at most one registration; a newer epoch replaces
an older one, and calls of the older epoch no longer change anything.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

from baton.core.worker_info import Epoch, WorkerId, WorkerInfo

Snapshot = Mapping[WorkerId, WorkerInfo]


class Registry(Protocol):
    """All calls answer within a second or raise Unavailable."""

    async def register(self, info: WorkerInfo, *, ttl_s: float) -> None:
        """Announce `info` for `ttl_s` seconds; replaces an earlier epoch of the same worker."""
        ...

    async def renew(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        """Start the time to live anew. False: the registration is gone, register again."""
        ...

    async def deregister(self, worker_id: WorkerId, epoch: Epoch) -> None:
        """Leave at once. Nothing happens when another epoch is registered by now."""
        ...

    async def list(self) -> Snapshot:
        """The live workers."""
        ...

    def watch(self) -> AsyncGenerator[Snapshot, None]:
        """The live workers now, and again upon every change, until the caller stops."""
        ...

    async def close(self) -> None:
        """Let go of connections. Registrations stay until their leases end."""
        ...
