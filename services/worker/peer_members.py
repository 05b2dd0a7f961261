"""Which processes are registered workers of this deployment, as a worker knows it.

One of two sources: the registry directory of the machine where there is one, else what routers
announce on their sessions. A worker is a member as one process lifetime (its epoch); the one
before is outdated.

Not known here: cards, secrets, leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from enum import Enum

from baton.core.errors import BatonError
from baton.core.request import PeerRef
from baton.core.worker_info import Epoch, WorkerId
from baton.registry.registry import Registry

logger = logging.getLogger(__name__)

REGISTRY_POLL_S = 0.2
MAX_OUTDATED = 4096


class Standing(Enum):
    MEMBER = "member"
    OUTDATED = "outdated"
    """Of an epoch that another one has replaced."""
    OTHER_EPOCH = "other epoch"
    """The id is known under an epoch of which we cannot say whether it is older or newer."""
    UNKNOWN = "unknown"
    NO_SOURCE = "no source"
    """Nobody has told this worker of any member yet."""


class PeerMembers:
    """Everything runs on one event loop."""

    def __init__(self, registry: Registry | None) -> None:
        """With a `registry` announcements of routers are not listened to."""
        self._registry = registry
        self._announced: dict[str, Mapping[WorkerId, Epoch]] = {}
        self._epochs: dict[WorkerId, Epoch] = {}
        self._outdated: dict[tuple[WorkerId, Epoch], None] = {}
        self._has_source = registry is not None
        self._read_at_s = float("-inf")
        self._changed = asyncio.Event()

    def announce(self, router_id: str, peers: Sequence[PeerRef]) -> None:
        """The workers a router knows; replaces what it said before."""
        if self._registry is not None:
            return
        self._has_source = True
        # Last, because the router that spoke last knows best when two differ on an epoch.
        self._announced.pop(router_id, None)
        self._announced[router_id] = {peer.worker_id: peer.epoch for peer in peers}
        self._merge()

    def router_gone(self, router_id: str) -> None:
        """Its session has ended. What the last router said stays until another one speaks: workers
        outlive routers."""
        self._announced.pop(router_id, None)
        if self._announced:
            self._merge()

    async def standing(self, worker_id: WorkerId, epoch: Epoch) -> Standing:
        """From what is known now, at most REGISTRY_POLL_S old."""
        await self._refresh()
        if not self._has_source:
            return Standing.NO_SOURCE
        known = self._epochs.get(worker_id)
        if known == epoch:
            return Standing.MEMBER
        if (worker_id, epoch) in self._outdated:
            return Standing.OUTDATED
        return Standing.UNKNOWN if known is None else Standing.OTHER_EPOCH

    async def wait_until_member(
        self, worker_id: WorkerId, epoch: Epoch, *, timeout_s: float
    ) -> Standing:
        """The standing as soon as it will not change by waiting, at the latest after `timeout_s`.

        A worker that has just started is known to some a moment before it is known to all.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            changed = self._changed
            standing = await self.standing(worker_id, epoch)
            left_s = deadline - loop.time()
            if standing not in (Standing.UNKNOWN, Standing.OTHER_EPOCH) or left_s <= 0:
                return standing
            try:
                async with asyncio.timeout(min(left_s, REGISTRY_POLL_S)):
                    await changed.wait()
            except TimeoutError:
                pass

    def _merge(self) -> None:
        merged: dict[WorkerId, Epoch] = {}
        for known in self._announced.values():
            merged.update(known)
        self._replace(merged)

    async def _refresh(self) -> None:
        if self._registry is None:
            return
        now_s = asyncio.get_running_loop().time()
        if now_s - self._read_at_s < REGISTRY_POLL_S:
            return
        self._read_at_s = now_s
        try:
            workers = await self._registry.list()
        except BatonError as error:
            logger.warning("the registry cannot be read, its last members stay: %s", error)
            return
        self._replace({info.worker_id: info.epoch for info in workers.values()})

    def _replace(self, epochs: dict[WorkerId, Epoch]) -> None:
        if epochs == self._epochs:
            return
        for worker_id, epoch in epochs.items():
            before = self._epochs.get(worker_id)
            self._outdated.pop((worker_id, epoch), None)
            if before is not None and before != epoch:
                self._outdated[worker_id, before] = None
        while len(self._outdated) > MAX_OUTDATED:
            del self._outdated[next(iter(self._outdated))]
        self._epochs = epochs
        self._changed.set()
        self._changed = asyncio.Event()
