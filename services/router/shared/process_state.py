"""`SharedState` of a router that has no store: everything in this process.

Exact for a single copy. Where several copies run without a store, each is told how many they are
and grants its share of every limit; placements reach nobody.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from baton.core.clock import Clock, MonotonicClock
from services.router.shared.local_view import share_of
from services.router.shared.state import (
    PlacementListener,
    PlacementNote,
    QuotaAnswer,
    QuotaGrant,
    QuotaLimits,
    SharedBackend,
    SharedStatus,
    TenantRecord,
)
from services.router.shared.store import Refund, Take
from services.router.shared.table import SharedTable
from services.router.shared.telemetry import SharedTelemetry


class ProcessState:
    """Never waits and never raises but for too many keys."""

    def __init__(
        self,
        *,
        num_copies: int = 1,
        clock: Clock | None = None,
        telemetry: SharedTelemetry | None = None,
    ) -> None:
        self._telemetry = telemetry
        self._clock = clock or MonotonicClock()
        self._num_copies = num_copies
        self._table = SharedTable()
        self._serial = itertools.count()
        self._held: set[str] = set()
        self._started_at_s = self._clock.now()

    async def start(self) -> None:
        self._started_at_s = self._clock.now()

    async def stop(self) -> None:
        self._held.clear()

    def status(self) -> SharedStatus:
        return SharedStatus(
            SharedBackend.PROCESS,
            is_up=True,
            num_copies=self._num_copies,
            since_s=self._clock.now() - self._started_at_s,
        )

    async def take_quota(
        self, tenant: str, *, limits: QuotaLimits, num_tokens: int, num_requests: int = 1
    ) -> QuotaAnswer:
        slot = f"{next(self._serial)}"
        grant = QuotaGrant(tenant, slot, num_tokens, limits)
        if limits.is_unlimited:
            return QuotaAnswer(grant)
        share = share_of(limits, self._num_copies)
        take = Take(tenant, share, num_requests, num_tokens, slot, math.inf)
        answer = self._table.take(take, self._clock.now())
        if answer.is_granted:
            self._held.add(slot)
        is_estimated = self._num_copies > 1
        if self._telemetry is not None:
            self._telemetry.answered(is_granted=answer.is_granted, is_estimated=is_estimated)
        return answer.for_request(grant, is_estimated=is_estimated)

    def return_quota(
        self,
        grant: QuotaGrant | None,
        *,
        num_unused_tokens: int = 0,
        num_unused_requests: int = 0,
    ) -> None:
        if grant is None or grant.slot not in self._held:
            return
        self._held.discard(grant.slot)
        limits = share_of(grant.limits, self._num_copies)
        unused = min(num_unused_tokens, grant.num_tokens)
        refund = Refund(grant.tenant, limits, num_unused_requests, unused, grant.slot)
        self._table.refund([refund], self._clock.now())

    async def key_owner(self, key_hash: str) -> TenantRecord | None:
        return self._table.read_key(key_hash)

    async def put_key(self, key_hash: str, record: TenantRecord) -> None:
        self._table.write_key(key_hash, record)

    async def remove_key(self, key_hash: str) -> bool:
        return self._table.delete_key(key_hash)

    async def list_keys(self) -> Mapping[str, TenantRecord]:
        return self._table.list_keys()

    def publish_placement(self, note: PlacementNote) -> None:
        """There is nobody to tell."""

    def on_placement(self, listener: PlacementListener) -> None:
        """No note ever comes."""
