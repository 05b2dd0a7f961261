"""Which workers there are and where: the source of sessions.

A snapshot maps worker ids to addresses; who a worker really is it says itself in its Welcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Protocol

from baton.core.worker_info import WorkerId
from baton.registry.registry import Registry

Snapshot = Mapping[WorkerId, str]
"""Worker id -> host:port of its gRPC server."""


class Membership(Protocol):
    """A source of snapshots."""

    def watch(self) -> AsyncIterator[Snapshot]:
        """The workers now, and again upon every change, until the caller stops."""
        ...


class StaticMembership:
    """A fixed list of addresses."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._snapshot = {WorkerId(address): address for address in addresses}

    async def watch(self) -> AsyncIterator[Snapshot]:
        yield self._snapshot


class RegistryMembership:
    """The workers that announce themselves in a registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def watch(self) -> AsyncIterator[Snapshot]:
        async with aclosing(self._registry.watch()) as snapshots:
            async for workers in snapshots:
                yield {worker_id: info.address for worker_id, info in workers.items()}

    async def close(self) -> None:
        """After the last `watch` has ended."""
        await self._registry.close()


class PushMembership:
    """Snapshots pushed in from outside, on the router's event loop."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self._snapshot: Snapshot = dict(snapshot or {})
        self._version = 0
        self._changed = asyncio.Event()

    def update(self, snapshot: Snapshot) -> None:
        """Replace the whole set of workers."""
        self._snapshot = dict(snapshot)
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncIterator[Snapshot]:
        seen = -1
        while True:
            changed = self._changed
            if seen != self._version:
                seen = self._version
                yield self._snapshot
            else:
                await changed.wait()
