"""All workers of this router: one session per address, one prefix index over them.

Follows a membership, opens and closes sessions, feeds the index from their KV events and takes
the snapshots (`ClusterView`) that placement works on.

Does not know: requests, retries, text.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from baton.core import metrics as series
from baton.core.errors import WorkerLost
from baton.core.fabric import FabricReport
from baton.core.lifecycle import EngineUse
from baton.core.tls import TlsFiles
from baton.core.worker_info import Role, WorkerId, WorkerInfo
from baton.telemetry.metrics import Metrics
from services.router.config import SessionConfig
from services.router.index.prefix_index import PrefixIndex
from services.router.placement.topology import LinkPrices
from services.router.placement.worker_table import WorkerTable
from services.router.requests.step_gap import Decoding
from services.router.workers.cluster_view import ClusterView, WorkerState
from services.router.workers.index_feed import IndexFeed
from services.router.workers.kv_feed import Held, KvChange, KvFault
from services.router.workers.membership import Membership, Snapshot
from services.router.workers.peers import peers_of
from services.router.workers.session_client import WorkerSession

logger = logging.getLogger(__name__)

MONITOR_PERIOD_S = 0.25
LATE_S = 0.5
MEMBERSHIP_RETRY_S = 1.0
PEERS_PAUSE_S = 0.1
"""Workers that come up together are named to each other in one message."""


class WorkerPool:
    """Implements SessionListener. Everything runs on one event loop."""

    def __init__(
        self,
        *,
        router_id: str,
        config: SessionConfig,
        index: PrefixIndex,
        metrics: Metrics | None = None,
        wall_clock: Callable[[], float] = time.time,
        tls: TlsFiles | None = None,
        links: LinkPrices | None = None,
    ) -> None:
        """`links`: what is assumed of links between workers until they have measured them."""
        self.index = index
        self._kv = IndexFeed(index, metrics)
        self._metrics = metrics
        self._router_id = router_id
        self._config = config
        self._tls = tls
        self._wall_clock = wall_clock
        self._sessions: dict[str, WorkerSession] = {}
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._by_id: dict[WorkerId, WorkerSession] = {}
        self._leaving: set[str] = set()
        """Addresses no longer in the membership whose requests may still finish."""
        self._tasks: list[asyncio.Task[None]] = []
        self._peers_timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._subscribers: list[Callable[[], None]] = []
        self.late_use: Callable[[str, Role, EngineUse], None] | None = None
        """Told what requests that are over here have cost a worker, by their id there."""
        self.table = WorkerTable(links, on_load=self._tell_load)

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every load report, and when a worker comes, goes or is lost. On the
        event loop, many times a second: it must only take note."""
        self._subscribers.append(callback)

    def start(self, membership: Membership) -> None:
        self._tasks = [
            asyncio.create_task(self._follow(membership), name="membership"),
            asyncio.create_task(self._monitor(), name="session monitor"),
        ]

    async def stop(self) -> None:
        """Close all sessions; their requests are told."""
        if self._peers_timer is not None:
            self._peers_timer.cancel()
        tasks = [*self._tasks, *self._runs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._kv.close()
        self._tasks.clear()
        self._runs.clear()
        self._sessions.clear()
        for worker_id in self._by_id:
            self.table.leave(worker_id)
        self._by_id.clear()

    def apply(self, snapshot: Snapshot) -> None:
        """Open sessions to new addresses. Those to addresses that are gone take no new work and
        are closed as soon as their requests have ended."""
        addresses = set(snapshot.values())
        self._leaving = self._sessions.keys() - addresses
        for worker_id, session in self._by_id.items():
            self.table.set_leaving(worker_id, session.address in self._leaving)
        self._close_left()
        for address in sorted(addresses - self._sessions.keys()):
            session = WorkerSession(
                address,
                router_id=self._router_id,
                config=self._config,
                listener=self,
                wall_clock=self._wall_clock,
                tls=self._tls,
            )
            self._sessions[address] = session
            self._runs[address] = asyncio.create_task(session.run(), name=f"worker {address}")

    def session(self, worker_id: WorkerId) -> WorkerSession:
        """Raises WorkerLost when the worker is not connected."""
        session = self._by_id.get(worker_id)
        if session is None or not session.is_ready or session.address in self._leaving:
            raise WorkerLost(f"worker {worker_id} is not connected")
        return session

    def sessions(self) -> list[WorkerSession]:
        """One per worker that was ever connected and has not left."""
        return [s for s in self._by_id.values() if s.address not in self._leaving]

    def view(self, *, with_leaving: bool = False) -> ClusterView:
        """`with_leaving`: also workers that have left the membership and still have requests."""
        now_s = asyncio.get_running_loop().time()
        return ClusterView(
            tuple(
                _state(s, now_s, is_leaving=s.address in self._leaving)
                for s in self._by_id.values()
                if with_leaving or s.address not in self._leaving
            )
        )

    def decoding(self, worker_id: WorkerId) -> Decoding | None:
        """What the worker decodes now; None when it does not, or is not known."""
        session = self._by_id.get(worker_id)
        if session is None:
            return None
        return session.step_gap.decoding(asyncio.get_running_loop().time())

    def num_computing(self, model: str) -> int:
        """Workers that compute prompts of `model`: its prefill workers, or all where none is."""
        infos = [s.info for s in self.sessions() if s.is_ready and s.info is not None]
        roles = [info.role for info in infos if info.model_name == model]
        return roles.count(Role.PREFILL) or len(roles)

    async def wait_for_change(self, timeout_s: float) -> None:
        """Returns after a worker came or went, at the latest after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    # SessionListener

    def on_ready(self, session: WorkerSession, held: Held) -> None:
        assert session.info is not None
        worker_id = session.info.worker_id
        other = self._by_id.get(worker_id)
        if other is not None and other is not session and other.is_ready:
            logger.warning("worker id %s answers at %s too", worker_id, other.address)
        self._drop_stale_ids(session)
        row = self.table.get(worker_id)
        if row is not None and row.info.epoch == session.info.epoch:
            # It may have changed its role while this router was not connected.
            self._count_role_change(row.info, session.info)
        self._by_id[worker_id] = session
        self._kv.ready(worker_id, held, session.kv_refusal)
        self.table.join(session.info, session.book, slot=self.index.slot_of(worker_id))
        self.table.set_leaving(worker_id, session.address in self._leaving)
        self._notify()

    def on_role(self, session: WorkerSession) -> None:
        worker_id = self._current(session)
        row = None if worker_id is None else self.table.get(worker_id)
        if row is None or session.info is None:
            return
        self._count_role_change(row.info, session.info)
        self.table.set_info(session.info)
        self._notify()

    def on_snapshot(self, session: WorkerSession, held: Held) -> None:
        if (worker_id := self._current(session)) is not None:
            self._kv.replace(worker_id, held)

    def on_kv_event(self, session: WorkerSession, change: KvChange) -> None:
        if (worker_id := self._current(session)) is not None:
            self._kv.change(worker_id, change)

    def on_kv_fault(self, session: WorkerSession, fault: KvFault) -> None:
        self._kv.fault(fault)

    def on_kv_refusal(self, session: WorkerSession, reason: str) -> None:
        if (worker_id := self._current(session)) is not None:
            self._kv.refuse(worker_id, reason)

    def on_session_fault(self, session: WorkerSession) -> None:
        if self._metrics is not None:
            self._metrics.add(series.SESSION_FAULTS, 1)

    def on_late_use(self, session: WorkerSession, wire_id: str, use: EngineUse) -> None:
        if self.late_use is not None and session.info is not None:
            self.late_use(wire_id, session.info.role, use)

    def on_fabric(self, session: WorkerSession, report: FabricReport) -> None:
        if session.info is not None and self._by_id.get(session.info.worker_id) is session:
            self.table.report_links(session.info.worker_id, report)

    def on_lost(self, session: WorkerSession) -> None:
        if session.info is not None and self._by_id.get(session.info.worker_id) is session:
            self.table.set_lost(session.info.worker_id)
            self._kv.replace(session.info.worker_id, {})
        self._notify()

    # Inside.

    def _count_role_change(self, before: WorkerInfo, after: WorkerInfo) -> None:
        if self._metrics is not None and before.role is not after.role:
            self._metrics.add(series.ROLE_CHANGES, 1, after.role.value)

    def _current(self, session: WorkerSession) -> WorkerId | None:
        """The session's worker, unless another session speaks for it by now."""
        if session.info is None or self._by_id.get(session.info.worker_id) is not session:
            return None
        return session.info.worker_id

    async def _follow(self, membership: Membership) -> None:
        while True:
            try:
                async for snapshot in membership.watch():
                    self.apply(snapshot)
                return
            except Exception:
                # The workers known so far stay; the source may recover.
                logger.exception("membership failed; trying again in %g s", MEMBERSHIP_RETRY_S)
            await asyncio.sleep(MEMBERSHIP_RETRY_S)

    async def _monitor(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            planned_at_s = loop.time() + MONITOR_PERIOD_S
            await asyncio.sleep(MONITOR_PERIOD_S)
            self._close_left()
            if loop.time() - planned_at_s > LATE_S:
                # This process stood still itself; what the workers sent is not read yet.
                continue
            for session in list(self._sessions.values()):
                session.check_idle(loop.time())

    def _close_left(self) -> None:
        for address in sorted(self._leaving):
            session = self._sessions[address]
            if session.is_ready and session.num_in_flight:
                continue
            logger.info("worker at %s left", address)
            self._leaving.discard(address)
            del self._sessions[address]
            self._runs.pop(address).cancel()
            self._forget(session)

    def _forget(self, session: WorkerSession) -> None:
        if session.info is None or self._by_id.get(session.info.worker_id) is not session:
            return
        del self._by_id[session.info.worker_id]
        self.table.leave(session.info.worker_id)
        self._kv.forget(session.info.worker_id)
        self._notify()

    def _drop_stale_ids(self, session: WorkerSession) -> None:
        """Another worker may have come up at an old one's address."""
        assert session.info is not None
        for worker_id, known in list(self._by_id.items()):
            if known is session and worker_id != session.info.worker_id:
                del self._by_id[worker_id]
                self.table.leave(worker_id)
                self._kv.forget(worker_id)

    def _tell_load(self) -> None:
        for callback in self._subscribers:
            callback()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._tell_load()
        if self._peers_timer is None:
            loop = asyncio.get_running_loop()
            self._peers_timer = loop.call_later(PEERS_PAUSE_S, self._tell_peers)

    def _tell_peers(self) -> None:
        """Let every worker know whom it may have to read from.

        A worker whose session is lost stays named until it leaves or comes back as another: the
        others may well reach it, and other routers' requests may be reading from it.
        """
        self._peers_timer = None
        sessions = {s.info: s for s in self._by_id.values() if s.info is not None}
        for info, peers in peers_of(sessions).items():
            sessions[info].tell_peers(peers)


def _state(session: WorkerSession, now_s: float, *, is_leaving: bool) -> WorkerState:
    assert session.info is not None
    return WorkerState(
        info=session.info,
        load=session.load,
        load_age_s=now_s - session.last_message_at_s,
        num_in_flight=session.num_in_flight,
        unreported_prefill_tokens=session.book.unreported_prefill_tokens,
        unreported_kv_tokens=session.book.unreported_kv_tokens,
        is_quarantined=not session.is_ready,
        is_leaving=is_leaving,
        fabric=session.fabric,
    )
