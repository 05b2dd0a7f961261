"""Leases on a worker's own blocks: who may still read what, and until when.

    grant ──► live ──extend, renew──► live ──complete──► over, valid
                └──────── expire, revoke ──────────────► over, not valid

Pure: the clock is passed in, releasing the blocks is the caller's work. Knows no readers and no
transport. One lease per request; a block may be under several leases (a shared prefix).
"""

from __future__ import annotations

import math
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.core.block import BlockId
from baton.core.clock import Clock
from baton.core.request import RequestId
from baton.core.worker_info import Epoch
from kvtransfer.messages import LeaseId

MAX_REMEMBERED_VERDICTS = 1024


@dataclass(frozen=True, slots=True)
class Lease:
    """A promise not to reuse `block_ids` before `expires_at_s` on the owner's clock."""

    lease_id: LeaseId
    request_id: RequestId
    epoch: Epoch
    expires_at_s: float
    block_ids: tuple[BlockId, ...]


class LeaseTable:
    """All live leases of one worker process."""

    def __init__(self, *, clock: Clock, epoch: Epoch, lease_s: float) -> None:
        self._clock = clock
        self._epoch = epoch
        self._lease_s = lease_s
        self._leases: dict[LeaseId, Lease] = {}
        self._by_request: dict[RequestId, LeaseId] = {}
        self.num_expired = 0
        """Since the start."""
        # A reader whose stream broke asks again; the same question must get the same answer.
        self._verdicts: OrderedDict[LeaseId, bool] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def lease_s(self) -> float:
        return self._lease_s

    @property
    def requests(self) -> list[RequestId]:
        """Those that have a live lease."""
        return list(self._by_request)

    @property
    def next_expiry_s(self) -> float:
        """When the first lease expires unless it is renewed; infinite without leases."""
        return min((lease.expires_at_s for lease in self._leases.values()), default=math.inf)

    def get(self, lease_id: LeaseId) -> Lease | None:
        return self._leases.get(lease_id)

    def grant(self, request_id: RequestId, block_ids: Sequence[BlockId]) -> Lease:
        """A new lease. Raises ValueError when the request already has one."""
        if request_id in self._by_request:
            raise ValueError(f"request {request_id} already has a lease; extend it")
        lease = Lease(
            LeaseId(secrets.token_hex(8)),
            request_id,
            self._epoch,
            self._clock.now() + self._lease_s,
            tuple(block_ids),
        )
        self._leases[lease.lease_id] = lease
        self._by_request[request_id] = lease.lease_id
        return lease

    def extend(self, lease_id: LeaseId, block_ids: Sequence[BlockId]) -> Lease:
        """Put more blocks under a live lease and renew it. Raises KeyError on an unknown one."""
        lease = self._leases[lease_id]
        return self._store(replace(lease, block_ids=(*lease.block_ids, *block_ids)))

    def renew(self, lease_id: LeaseId) -> bool:
        """A full term from now; False when the lease is over."""
        lease = self._live(lease_id)
        if lease is not None:
            self._store(lease)
        return lease is not None

    def complete(self, lease_id: LeaseId, epoch: Epoch) -> bool:
        """End the lease; True when it was ours and live until now."""
        if lease_id in self._verdicts:
            return self._verdicts[lease_id] and epoch == self._epoch
        lease = self._live(lease_id)
        if lease is None or epoch != self._epoch:
            return False
        self._remove(lease)
        self._remember(lease_id, valid=True)
        return True

    def revoke(self, lease_id: LeaseId) -> Lease | None:
        """End the lease against its reader's will; None when it is already over."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            self._remove(lease)
            self._remember(lease_id, valid=False)
        return lease

    def expire(self) -> list[Lease]:
        """End and return every lease whose time is up."""
        now_s = self._clock.now()
        over = [lease for lease in self._leases.values() if lease.expires_at_s <= now_s]
        for lease in over:
            self.revoke(lease.lease_id)
        self.num_expired += len(over)
        return over

    def check_integrity(self) -> None:
        """Raises AssertionError when the two indices disagree."""
        by_request = {lease.request_id: lease.lease_id for lease in self._leases.values()}
        assert by_request == self._by_request, "lease indices disagree"
        assert len(by_request) == len(self._leases), "two leases for one request"
        assert not self._verdicts.keys() & self._leases.keys(), "a live lease has a verdict"
        assert len(self._verdicts) <= MAX_REMEMBERED_VERDICTS

    def _live(self, lease_id: LeaseId) -> Lease | None:
        lease = self._leases.get(lease_id)
        return lease if lease is not None and lease.expires_at_s > self._clock.now() else None

    def _store(self, lease: Lease) -> Lease:
        renewed = replace(lease, expires_at_s=self._clock.now() + self._lease_s)
        self._leases[lease.lease_id] = renewed
        return renewed

    def _remove(self, lease: Lease) -> None:
        del self._leases[lease.lease_id]
        del self._by_request[lease.request_id]

    def _remember(self, lease_id: LeaseId, *, valid: bool) -> None:
        self._verdicts[lease_id] = valid
        if len(self._verdicts) > MAX_REMEMBERED_VERDICTS:
            self._verdicts.popitem(last=False)
