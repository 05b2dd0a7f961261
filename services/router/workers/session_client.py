"""The router's end of the session with one worker.

    CONNECTING ── Welcome ──► READY ── stream ends, falls silent or is broken off ──► LOST
        ▲                                                                              │
        └───────────────────────────── pause (backoff) ────────────────────────────────┘

One stream carries all requests. Its messages are fanned out to the mailboxes of the requests; its
KV events and identity go to a listener. When it is lost, every request on it gets to know at
once, and the worker takes no work before the next Welcome: that is its quarantine. A worker that
comes back under another epoch has an empty past anyway, since each Welcome is a fresh snapshot.

Does not know: placement, retries, text.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from baton.core.errors import WorkerLost
from baton.core.fabric import FabricReport
from baton.core.logging import log_fields
from baton.core.request import GenerateRequest, PeerRef, RequestId
from baton.core.tls import TlsFiles
from baton.core.worker_info import LoadReport, WorkerInfo
from baton.rpc.convert import (
    engine_use_from_wire,
    fabric_from_wire,
    load_from_wire,
    peer_to_wire,
    request_to_wire,
    worker_info_from_wire,
)
from baton.rpc.v1 import worker_pb2 as pb
from services.router.config import SessionConfig
from services.router.placement.load_book import LoadBook
from services.router.requests.mailbox import Arrival, Recipient
from services.router.requests.step_gap import StepGap
from services.router.workers.kv_feed import Held, KvChange, KvFault, KvFeed
from services.router.workers.session_listener import SessionListener, SessionState
from services.router.workers.session_stream import CLOSE_TIMEOUT_S, SessionStream
from services.router.workers.wire_delta import delta_from_wire, is_last

logger = logging.getLogger(__name__)

CLOSED_BY_US = "the router closed the session"


class WorkerSession:
    """One worker's session. `run` keeps it open until cancelled."""

    def __init__(
        self,
        address: str,
        *,
        router_id: str,
        config: SessionConfig,
        listener: SessionListener,
        wall_clock: Callable[[], float] = time.time,
        tls: TlsFiles | None = None,
    ) -> None:
        self.address = address
        self.state = SessionState.CONNECTING
        self.info: WorkerInfo | None = None
        """Of the current or the last session."""
        self.last_message_at_s = 0.0
        """Event-loop time."""
        self.last_progress_at_s = 0.0
        """Event-loop time of the last token, stored block or computed prompt token."""
        self.lost_reason = "not connected yet"
        self.fabric: FabricReport | None = None
        """How KV comes to the worker; None until this session has heard of it."""
        self.book = LoadBook()
        """What the worker has to do, in numbers for placement."""
        self.step_gap = StepGap()
        self._config = config
        self._listener = listener
        self._wall_clock = wall_clock
        self._requests: dict[str, Recipient] = {}
        """Of the requests on the worker: where their deltas go."""
        self._load = pb.LoadReport()
        self._peers: tuple[PeerRef, ...] = ()
        self._stream = SessionStream(address, self, router_id=router_id, config=config, tls=tls)
        self._kv = KvFeed(
            address,
            self,
            fetch_snapshot=self._stream.snapshot,
            give_up=self.break_off,
            max_blocks=config.max_snapshot_blocks,
        )
        self._serving: asyncio.Task[str] | None = None
        self._pause_s = 0.0
        self._logged_reason = ""

    @property
    def is_ready(self) -> bool:
        return self.state is SessionState.READY

    @property
    def kv_refusal(self) -> str:
        """Why this session's KV events are not used; empty while they are."""
        return self._kv.refusal

    @property
    def num_in_flight(self) -> int:
        return len(self._requests)

    @property
    def peer_ref(self) -> PeerRef:
        """Where other workers find this one."""
        assert self.info is not None, "only after Welcome"
        return PeerRef(self.info.worker_id, self.info.epoch, self.info.address)

    @property
    def load(self) -> LoadReport:
        return load_from_wire(self._load)

    def submit(
        self, request: GenerateRequest, mailbox: Recipient, *, prefill_tokens: int, kv_tokens: int
    ) -> None:
        """Send `request`; its deltas go to `mailbox`. Raises WorkerLost while not READY.

        `prefill_tokens` and `kv_tokens`: what it will cost the worker, until it reports itself.
        """
        if not self.is_ready:
            raise WorkerLost(f"worker at {self.address} is not connected: {self.lost_reason}")
        now_s = asyncio.get_running_loop().time()
        self._drop(request.request_id)
        self._requests[request.request_id] = mailbox
        self.book.sent(
            request.request_id, prefill_tokens=prefill_tokens, kv_tokens=kv_tokens, now_s=now_s
        )
        message = request_to_wire(request)
        assert self.info is not None, "READY comes with Welcome"
        message.role_version = self.info.role_version
        self._stream.send(pb.RouterMessage(submit=message))

    def cancel(self, request_id: RequestId, reason: str) -> None:
        """Tell the worker; nothing more of this request is delivered. Any state."""
        self._drop(request_id)
        if self.is_ready:
            self._stream.send(
                pb.RouterMessage(cancel=pb.Cancel(request_id=request_id, reason=reason))
            )

    def is_running(self, request_id: RequestId) -> bool:
        """The worker has been sent this request and has not said its last word on it."""
        return request_id in self._requests

    def forget(self, request_id: RequestId) -> None:
        """Deliver nothing more of this request, which the worker has finished by itself."""
        self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        if self._requests.pop(request_id, None) is not None:
            self.book.ended(request_id)

    def tell_peers(self, peers: tuple[PeerRef, ...]) -> None:
        """Name the workers this one may have to read from, unless it has heard of just these."""
        if self.is_ready and peers != self._peers:
            self._peers = peers
            self._stream.send(pb.RouterMessage(peers=pb.Peers(peers=map(peer_to_wire, peers))))

    def break_off(self, reason: str, *, pause_s: float = 0.0) -> None:
        """Take the worker as lost now; connect again after `pause_s` at the earliest."""
        self._pause_s = max(self._pause_s, pause_s)
        self._lose(reason)
        if self._serving is not None:
            self._serving.cancel()

    def quarantine(self, reason: str) -> None:
        """Break off with a worker that answers but does not work, and leave it alone a while."""
        self.break_off(reason, pause_s=self._config.stall_quarantine_s)

    def check_idle(self, now_s: float) -> None:
        """To be called often: breaks the session off when the worker has fallen silent."""
        silent_s = now_s - self.last_message_at_s
        if self.is_ready and silent_s > self._config.idle_timeout_s:
            self.break_off(f"no message for {silent_s:.1f} s")

    async def run(self) -> None:
        """Connect, serve, reconnect; ends by cancellation only."""
        backoff_s = self._config.backoff_min_s
        try:
            while True:
                self.state = SessionState.CONNECTING
                was_ready = False
                try:
                    was_ready = await self._run_once()
                except Exception:
                    # A defect of ours must not end the attempts to reach the worker.
                    logger.exception("session with %s failed", self.address)
                    self._lose("defect in the router")
                backoff_s = (
                    self._config.backoff_min_s
                    if was_ready
                    else min(2 * backoff_s, self._config.backoff_max_s)
                )
                pause_s, self._pause_s = max(self._pause_s, backoff_s), 0.0
                await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
        finally:
            self._lose(CLOSED_BY_US)
            self.state = SessionState.CLOSED

    async def _run_once(self) -> bool:
        """One connection from start to end; returns whether it ever was READY."""
        welcomed_before = self.info
        self._serving = asyncio.create_task(self._stream.serve(), name=f"session {self.address}")
        try:
            # wait() instead of await: breaking off cancels the inner task only.
            await asyncio.wait([self._serving])
        finally:
            if not self._serving.done():
                self._serving.cancel()
                await asyncio.wait([self._serving], timeout=CLOSE_TIMEOUT_S)
        serving, self._serving = self._serving, None
        if not serving.cancelled():
            error = serving.exception()
            if error is not None:
                logger.error("session with %s failed", self.address, exc_info=error)
            self._lose(repr(error) if error is not None else serving.result())
        return self.info is not welcomed_before

    # StreamOwner

    def on_welcome(self, welcome: pb.Welcome) -> None:
        info = worker_info_from_wire(welcome.info)
        is_restarted = self.info is not None and self.info.epoch != info.epoch
        self.info = info
        self._load = welcome.load
        self._logged_reason = ""
        held = self._kv.start(welcome, info.layout)
        self._stream.clear()
        self._peers, self.fabric = (), None
        self.last_message_at_s = self.last_progress_at_s = asyncio.get_running_loop().time()
        self.book.report(welcome.load, self.last_message_at_s)
        self.state = SessionState.READY
        self._listener.on_ready(self, held)
        log_fields(
            logger,
            "worker connected",
            worker=info.worker_id,
            epoch=info.epoch,
            role=info.role.value,
            address=self.address,
            is_restarted=is_restarted,
        )

    def on_message(self, message: pb.WorkerMessage) -> None:
        if message.HasField("step"):
            self._on_step(message.step)
            return
        self.last_message_at_s = asyncio.get_running_loop().time()
        if message.HasField("info"):
            self._on_role(worker_info_from_wire(message.info))
        if message.HasField("fabric"):
            self.fabric = fabric_from_wire(message.fabric)
            self._listener.on_fabric(self, self.fabric)

    def _on_role(self, info: WorkerInfo) -> None:
        known = self.info
        assert known is not None, "Welcome comes first"
        if (info.worker_id, info.epoch) != (known.worker_id, known.epoch):
            raise ValueError(f"{known.worker_id} says that it is {info.worker_id} now")
        self.info = info
        self._listener.on_role(self)
        log_fields(
            logger,
            "worker has changed its role",
            worker=info.worker_id,
            role=info.role.value,
            role_version=info.role_version,
        )

    def on_nonsense(self) -> None:
        self._listener.on_session_fault(self)
        if self.is_ready:
            # Its Welcome is in order: at once connected again, it would be large and in vain.
            self._pause_s = max(self._pause_s, self._config.stall_quarantine_s)

    def on_end(self) -> None:
        self._kv.stop()

    def _on_step(self, batch: pb.StepBatch) -> None:
        now_s = asyncio.get_running_loop().time()
        self.last_message_at_s = now_s
        if batch.deltas:
            self.last_progress_at_s = now_s
            load = batch.load if batch.HasField("load") else self._load
            self.step_gap.note(
                now_s,
                len(batch.deltas[0].token_ids),
                num_sequences=load.num_running,
                kv_tokens=load.resident_kv_tokens,
            )
            self._deliver(batch, now_s)
        for late in batch.late_uses:
            self._listener.on_late_use(self, late.request_id, engine_use_from_wire(late.use))
        if batch.HasField("load"):
            if batch.load.queued_prefill_tokens < self._load.queued_prefill_tokens:
                self.last_progress_at_s = now_s
            self._load = batch.load
            self.book.report(batch.load, now_s)
        if batch.kv_events:
            self.last_progress_at_s = now_s
            self._kv.push(batch.first_kv_sequence, batch.kv_events)

    def _deliver(self, batch: pb.StepBatch, now_s: float) -> None:
        assert self.info is not None
        worker_id, at_s = self.info.worker_id, self._wall_clock()
        requests = self._requests
        for message in batch.deltas:
            mailbox = requests.get(message.request_id)
            if mailbox is None:
                if message.HasField("timeline"):
                    use = engine_use_from_wire(message.timeline.engine)
                    self._listener.on_late_use(self, message.request_id, use)
                continue
            delta = delta_from_wire(message)
            if is_last(delta):
                self._drop(delta.request_id)
            mailbox.put(Arrival(worker_id, at_s, delta), now_s)

    # KvListener

    def on_kv_event(self, change: KvChange) -> None:
        self._listener.on_kv_event(self, change)

    def on_snapshot(self, held: Held) -> None:
        self._listener.on_snapshot(self, held)

    def on_kv_fault(self, fault: KvFault) -> None:
        self._listener.on_kv_fault(self, fault)

    def on_kv_refusal(self, reason: str) -> None:
        self._listener.on_kv_refusal(self, reason)

    def _lose(self, reason: str) -> None:
        """Tell every request; only the first reason of a session counts."""
        was_ready = self.is_ready
        if self.state in (SessionState.LOST, SessionState.CLOSED):
            return
        self.state = SessionState.LOST
        self.lost_reason = reason
        self._kv.stop()
        self._stream.clear()
        requests, self._requests = self._requests, {}
        now_s, at_s = asyncio.get_running_loop().time(), self._wall_clock()
        worker_id = None if self.info is None else self.info.worker_id
        self.book.clear()
        for mailbox in requests.values():
            mailbox.put(Arrival(worker_id, at_s, lost=reason), now_s)
        if not was_ready and reason not in (CLOSED_BY_US, self._logged_reason):
            # Each attempt would repeat it.
            self._logged_reason = reason
            logger.warning("no session with the worker at %s: %s", self.address, reason)
        if was_ready:
            logger.log(
                logging.INFO if reason == CLOSED_BY_US else logging.WARNING,
                "worker %s lost with %d requests: %s",
                worker_id,
                len(requests),
                reason,
            )
            self._listener.on_lost(self)
