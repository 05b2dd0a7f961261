"""What one router has yet to be told, and the set of connected routers.

A router that keeps up gets one message per engine step. One that reads slowly gets the same
content in fewer messages: tokens of a request are joined, loads and fabric reports are replaced by
later ones, KV events are kept in order. Beyond a bound its session is closed, so that it starts
over from a snapshot instead of taking the worker's memory.

No gRPC calls here; `session_server` moves messages.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

from baton.core.block import join_hashes
from baton.core.errors import BatonError, Unavailable
from baton.core.fabric import FabricReport
from baton.core.lifecycle import EngineUse
from baton.core.request import RequestId, TokenDelta
from baton.core.worker_info import LoadReport, WorkerInfo
from baton.rpc.convert import (
    delta_to_wire,
    engine_use_to_wire,
    fabric_to_wire,
    load_to_wire,
    worker_info_to_wire,
)
from baton.rpc.v1 import worker_pb2 as pb
from services.worker.config import SessionConfig
from services.worker.kv_events import KvEvent


class Outbox:
    """Pending content for one router."""

    def __init__(self, config: SessionConfig) -> None:
        self._config = config
        self._deltas: list[TokenDelta] = []
        self._last_of: dict[RequestId, int] = {}
        self._num_tokens = 0
        self._load: LoadReport | None = None
        self._fabric: FabricReport | None = None
        self._events: list[pb.KvEvent] = []
        self._first_event = 0
        self._num_hashes = 0
        self._late_uses: list[pb.LateUse] = []
        self._info: WorkerInfo | None = None

    @property
    def is_empty(self) -> bool:
        return not (self._has_step or self._fabric or self._info)

    @property
    def _has_step(self) -> bool:
        return bool(self._deltas or self._events or self._load or self._late_uses)

    @property
    def overflow(self) -> str:
        """Which bound is passed, empty while none is."""
        if self._num_tokens > self._config.max_pending_tokens:
            return f"{self._num_tokens} tokens wait, limit {self._config.max_pending_tokens}"
        if self._num_hashes > self._config.max_pending_hashes:
            return f"{self._num_hashes} KV hashes wait, limit {self._config.max_pending_hashes}"
        return ""

    def add_delta(self, delta: TokenDelta) -> None:
        self._num_tokens += 1 + len(delta.token_ids)
        index = self._last_of.get(delta.request_id)
        if index is not None and _continues(self._deltas[index], delta):
            self._deltas[index] = _join(self._deltas[index], delta)
            return
        self._last_of[delta.request_id] = len(self._deltas)
        self._deltas.append(delta)

    def add_late_use(self, request_id: RequestId, use: EngineUse) -> None:
        self._num_tokens += 1
        self._late_uses.append(pb.LateUse(request_id=request_id, use=engine_use_to_wire(use)))

    def add_event(self, sequence: int, event: KvEvent) -> None:
        """Events come in order and without gaps."""
        if not self._events:
            self._first_event = sequence
        self._events.append(
            pb.KvEvent(
                stored=join_hashes(event.stored),
                removed=join_hashes(event.removed),
                on_host=join_hashes(event.on_host),
                on_disk=join_hashes(event.on_disk),
            )
        )
        self._num_hashes += 1 + event.num_hashes

    def forget_events(self, up_to: int) -> None:
        """Drop events that a snapshot already contains."""
        num_contained = max(0, up_to - self._first_event + 1)
        self._events = self._events[num_contained:]
        self._first_event += num_contained

    def set_load(self, load: LoadReport) -> None:
        self._load = load

    def set_fabric(self, report: FabricReport) -> None:
        self._fabric = report

    def set_info(self, info: WorkerInfo) -> None:
        self._info = info

    def take_messages(self) -> list[pb.WorkerMessage]:
        """Everything pending; the outbox is empty afterwards."""
        messages: list[pb.WorkerMessage] = []
        if self._info is not None:
            # Before the load, which may say that work is taken again.
            messages.append(pb.WorkerMessage(info=worker_info_to_wire(self._info)))
            self._info = None
        if self._has_step:
            messages.append(pb.WorkerMessage(step=self.take()))
        if self._fabric is not None:
            messages.append(pb.WorkerMessage(fabric=fabric_to_wire(self._fabric)))
            self._fabric = None
        return messages

    def take(self) -> pb.StepBatch:
        """Everything pending but the fabric report, as one message."""
        batch = pb.StepBatch(
            deltas=[delta_to_wire(delta) for delta in self._deltas],
            load=None if self._load is None else load_to_wire(self._load),
            first_kv_sequence=self._first_event if self._events else 0,
            kv_events=self._events,
            late_uses=self._late_uses,
        )
        self._deltas, self._last_of, self._num_tokens = [], {}, 0
        self._late_uses = []
        self._load, self._events, self._num_hashes = None, [], 0
        return batch


def _continues(earlier: TokenDelta, later: TokenDelta) -> bool:
    is_open = earlier.finish_reason is None and earlier.timeline is None
    return is_open and later.first_index == earlier.first_index + len(earlier.token_ids)


def _join(earlier: TokenDelta, later: TokenDelta) -> TokenDelta:
    return dataclasses.replace(
        later,
        first_index=earlier.first_index,
        token_ids=[*earlier.token_ids, *later.token_ids],
        logprobs=[*earlier.logprobs, *later.logprobs],
        num_cached_tokens=max(earlier.num_cached_tokens, later.num_cached_tokens),
    )


class RouterSession:
    """One connected router. Compared by identity."""

    def __init__(self, router_id: str, config: SessionConfig) -> None:
        self.router_id = router_id
        self.outbox = Outbox(config)
        self._wake = asyncio.Event()
        self._closed: asyncio.Future[BatonError] = asyncio.get_running_loop().create_future()

    def send(self, delta: TokenDelta) -> None:
        """Queue a delta; dropped when the session is closed."""
        if not self._closed.done():
            self.outbox.add_delta(delta)
            self.notify()

    def send_late_use(self, request_id: RequestId, use: EngineUse) -> None:
        """What the engine has spent on a request whose last delta has gone before."""
        if not self._closed.done():
            self.outbox.add_late_use(request_id, use)
            self.notify()

    def notify(self) -> None:
        """Wake the writer, or close the session when the outbox has grown too large."""
        overflow = self.outbox.overflow
        if overflow:
            self.close(Unavailable(f"router reads too slowly: {overflow}; open a new session"))
        self._wake.set()

    def close(self, reason: BatonError) -> None:
        """End the session with `reason` as its status. Only the first call counts."""
        if not self._closed.done():
            self._closed.set_result(reason)

    @property
    def is_closed(self) -> bool:
        return self._closed.done()

    async def closed(self) -> BatonError:
        """Waits for the end and returns its reason."""
        return await asyncio.shield(self._closed)

    async def next_messages(self) -> list[pb.WorkerMessage]:
        """Waits for something to tell and returns all of it."""
        while self.outbox.is_empty:
            self._wake.clear()
            await self._wake.wait()
        return self.outbox.take_messages()


class Sessions:
    """All connected routers."""

    def __init__(self) -> None:
        self._sessions: set[RouterSession] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[RouterSession]:
        return iter(tuple(self._sessions))

    def open(self, session: RouterSession) -> None:
        """Add a session. An older one of the same router is a broken link not noticed yet."""
        for other in tuple(self._sessions):
            if other.router_id == session.router_id:
                other.close(Unavailable(f"router {other.router_id} opened a newer session"))
        self._sessions.add(session)

    def remove(self, session: RouterSession) -> None:
        self._sessions.discard(session)

    def close_all(self, reason: BatonError) -> None:
        for session in tuple(self._sessions):
            session.close(reason)

    def broadcast_load(self, load: LoadReport) -> None:
        for session in self._sessions:
            session.outbox.set_load(load)
            session.notify()

    def broadcast_fabric(self, report: FabricReport) -> None:
        for session in self._sessions:
            session.outbox.set_fabric(report)
            session.notify()

    def broadcast_info(self, info: WorkerInfo) -> None:
        """The worker has another role."""
        for session in self._sessions:
            session.outbox.set_info(info)
            session.notify()

    def broadcast_event(self, sequence: int, event: KvEvent) -> None:
        """To be followed by `broadcast_load`, which wakes the writers."""
        for session in self._sessions:
            session.outbox.add_event(sequence, event)
