"""`SharedState` over a store that can be away: Redis or a Ray actor.

A request asks the store within `budget_s`, and only while the circuit is closed. Else its answer
comes from the local view. Beside the requests stands the keeper: it gives back quota and shows
signs of life, in this order on one task, so that a slot that was given back is never renewed
after. While the store is away the keeper alone probes it, and heals when it answers:

    sign of life, with the slots of running requests (a store that came back empty learns of them)
    ──► charge what was granted here meanwhile ──► close the circuit
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Mapping

from baton.core.clock import Clock, MonotonicClock
from baton.core.errors import Unavailable
from services.router.shared.circuit import StoreCircuit
from services.router.shared.config import SharedConfig
from services.router.shared.deadline import STORE_TIMEOUT_S, within
from services.router.shared.exchange import PlacementExchange
from services.router.shared.held import HeldGrants
from services.router.shared.key_lookup import KeyLookup
from services.router.shared.local_view import LocalView
from services.router.shared.outbox import RefundQueue
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
from services.router.shared.store import Beat, GarbageValue, Refund, Store, Take
from services.router.shared.telemetry import SharedTelemetry

logger = logging.getLogger(__name__)

BEATS_PER_TTL = 4
STOP_TIMEOUT_S = 1.0
UNLIMITED = ""
"""The slot of a grant that needs no account."""


class RemoteState:
    """One copy's view of what all share; see `SharedState`."""

    def __init__(
        self,
        store: Store,
        *,
        backend: SharedBackend,
        copy_id: str,
        config: SharedConfig,
        telemetry: SharedTelemetry,
        clock: Clock | None = None,
    ) -> None:
        """`copy_id`: unique over all copies and starts. The store is closed by `stop`."""
        self._store = store
        self._backend = backend
        self._copy_id = copy_id
        self._config = config
        self._telemetry = telemetry
        self._clock = clock or MonotonicClock()
        self._circuit = StoreCircuit(self._clock.now())
        self._view = LocalView()
        self._held = HeldGrants()
        self._refunds = RefundQueue()
        self._wake = asyncio.Event()
        self._keys = KeyLookup(store, config=config, telemetry=telemetry, clock=self._clock)
        self._exchange = PlacementExchange(
            store, copy_id=copy_id, telemetry=telemetry, on_failure=self._failed
        )
        self._serial = itertools.count()
        self._num_copies = 1
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if not await self._beat():
            self._telemetry.went_away(self._circuit.reason)
        self._keeper = asyncio.create_task(self._keep(), name="shared state keeper")
        self._exchange.start()

    async def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._exchange.stop()
        await self._keys.stop()
        for refund in self._held.clear():
            self._refunds.add(refund)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                if self._circuit.is_closed:
                    await self._send_refunds()
                    await self._store.leave(self._copy_id)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._store.close()

    def status(self) -> SharedStatus:
        return SharedStatus(
            self._backend,
            is_up=self._circuit.is_closed,
            num_copies=self._num_copies,
            since_s=self._clock.now() - self._circuit.since_s,
            reason=self._circuit.reason,
        )

    async def take_quota(
        self, tenant: str, *, limits: QuotaLimits, num_tokens: int, num_requests: int = 1
    ) -> QuotaAnswer:
        if limits.is_unlimited:
            return QuotaAnswer(QuotaGrant(tenant, UNLIMITED, num_tokens, limits))
        slot = f"{self._copy_id}:{next(self._serial)}"
        grant = QuotaGrant(tenant, slot, num_tokens, limits)
        take = Take(tenant, limits, num_requests, num_tokens, slot, self._config.slot_ttl_s)
        answer = await self._take_exactly(take, grant)
        if answer is None:
            answer = self._estimate(take, grant)
        self._telemetry.answered(is_granted=answer.is_granted, is_estimated=answer.is_estimated)
        return answer

    def return_quota(
        self,
        grant: QuotaGrant | None,
        *,
        num_unused_tokens: int = 0,
        num_unused_requests: int = 0,
    ) -> None:
        held = None if grant is None else self._held.remove(grant.slot)
        if grant is None or held is None:
            return
        unused = min(num_unused_tokens, grant.num_tokens)
        refund = Refund(grant.tenant, grant.limits, num_unused_requests, unused, grant.slot)
        if held.is_estimated:
            self._view.refund(refund, num_copies=self._num_copies, now_s=self._clock.now())
            if self._circuit.is_closed and grant.limits.max_concurrent is not None:
                # A sign of life may have entered its slot meanwhile.
                self._refund_later(Refund(grant.tenant, grant.limits, slot=grant.slot))
        else:
            self._refund_later(refund)

    async def key_owner(self, key_hash: str) -> TenantRecord | None:
        if self._circuit.is_closed and not self._keys.is_fresh(key_hash):
            try:
                return await self._keys.ask(key_hash)
            except TimeoutError:
                self._timed_out()
            except GarbageValue:
                # Counted already; the store itself answers.
                pass
            except Exception as error:
                self._failed(error)
        return self._keys.from_memory(key_hash)

    async def put_key(self, key_hash: str, record: TenantRecord) -> None:
        async with within(STORE_TIMEOUT_S, "storing a key"):
            await self._store.write_key(key_hash, record)
        self._keys.remember(key_hash, record)

    async def remove_key(self, key_hash: str) -> bool:
        async with within(STORE_TIMEOUT_S, "removing a key"):
            was_there = await self._store.delete_key(key_hash)
        self._keys.remember(key_hash, None)
        return was_there

    async def list_keys(self) -> Mapping[str, TenantRecord]:
        return await self._store.list_keys()

    def publish_placement(self, note: PlacementNote) -> None:
        if self._circuit.is_closed and self._num_copies > 1:
            self._exchange.publish(note)

    def on_placement(self, listener: PlacementListener) -> None:
        self._exchange.listen(listener)

    # Requests.

    async def _take_exactly(self, take: Take, grant: QuotaGrant) -> QuotaAnswer | None:
        """None: the store did not answer."""
        if not self._circuit.is_closed:
            return None
        try:
            async with asyncio.timeout(self._config.budget_s):
                answer = await self._store.take(take)
        except TimeoutError:
            self._timed_out()
            # It may have arrived all the same; then only this frees what it took.
            self._refund_later(_undo(take))
            return None
        except asyncio.CancelledError:
            self._refund_later(_undo(take))
            raise
        except Exception as error:
            self._failed(error)
            return None
        self._circuit.succeeded()
        self._view.saw(take, answer, self._num_copies, self._clock.now())
        if answer.is_granted:
            self._held.add(grant, is_estimated=False)
        return answer.for_request(grant, is_estimated=False)

    def _estimate(self, take: Take, grant: QuotaGrant) -> QuotaAnswer:
        answer = self._view.estimate(
            take,
            num_copies=self._num_copies,
            num_held=self._held.count(take.tenant),
            now_s=self._clock.now(),
        )
        if answer.is_granted:
            self._held.add(grant, is_estimated=True)
        return answer.for_request(grant, is_estimated=True)

    def _refund_later(self, refund: Refund) -> None:
        self._refunds.add(refund)
        self._wake.set()

    # The circuit.

    def _timed_out(self) -> None:
        reason = f"no answer within {self._config.budget_s * 1000:.0f} ms"
        if self._circuit.timed_out(reason, self._clock.now()):
            self._went_away()

    def _failed(self, error: Exception) -> None:
        if not isinstance(error, Unavailable):
            # A defect of ours or of a client library: no request may die of it.
            logger.error("the shared store failed unexpectedly", exc_info=error)
        if self._circuit.failed(str(error), self._clock.now()):
            self._went_away()

    def _went_away(self) -> None:
        self._telemetry.went_away(self._circuit.reason)
        self._exchange.drop_all()
        # The keeper probes from now on.
        self._wake.set()

    # The keeper.

    async def _keep(self) -> None:
        beat_at_s = self._clock.now() + self._beat_period_s
        while True:
            if self._circuit.is_closed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, beat_at_s - self._clock.now())):
                        await self._wake.wait()
                self._wake.clear()
                await self._send_refunds()
            else:
                # Refunds wait until it is back.
                await asyncio.sleep(self._circuit.next_probe_pause_s())
                beat_at_s = 0.0
            if self._clock.now() >= beat_at_s:
                await self._beat()
                beat_at_s = self._clock.now() + self._beat_period_s

    @property
    def _beat_period_s(self) -> float:
        return self._config.copy_ttl_s / BEATS_PER_TTL

    async def _send_refunds(self) -> None:
        while self._circuit.is_closed and (refunds := self._refunds.next_batch()):
            try:
                async with within(STORE_TIMEOUT_S, "giving quota back"):
                    await self._store.refund(refunds)
            except Exception as error:
                self._failed(error)

    async def _beat(self) -> bool:
        """Show a sign of life; heal when the store had been away."""
        beat = Beat(
            self._copy_id,
            self._config.copy_ttl_s,
            self._held.limited_slots(),
            self._config.slot_ttl_s,
        )
        try:
            async with within(STORE_TIMEOUT_S, "the sign of life of this router"):
                num_copies = await self._store.beat(beat)
                self._num_copies = max(1, num_copies)
                self._telemetry.set_copies(self._num_copies)
                if not self._circuit.is_closed:
                    await self._heal()
        except Exception as error:
            self._failed(error)
            return False
        return True

    async def _heal(self) -> None:
        away_s = self._clock.now() - self._circuit.since_s
        while charges := self._view.charges(num_copies=self._num_copies, now_s=self._clock.now()):
            await self._store.refund(charges)
        # No await from here on: all that is granted from now on is granted by the store.
        self._held.settle()
        self._circuit.close(self._clock.now())
        self._telemetry.came_back(away_s)


def _undo(take: Take) -> Refund:
    return Refund(
        take.tenant,
        take.limits,
        num_requests=take.num_requests,
        num_tokens=take.num_tokens,
        slot=take.slot,
        only_if_held=True,
    )
