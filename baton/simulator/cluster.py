"""The whole platform in virtual time: arrivals are placed, computed, handed over, decoded.

    arrival ─► a router copy admits and places ─► prefill worker computes, decode worker reserves
            first token at the end of the prefill ─► KV arrives ─► decode worker goes on ─► end

A prefix that another worker caches is read before the prompt is submitted, as the router offers and
the worker's own cost rule decides. No worker fails here.

Does not know: files, clocks, how results are shown.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.lifecycle import Timeline
from baton.core.request import (
    FinishReason,
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    TokenDelta,
    Work,
)
from baton.core.worker_info import Role, WorkerId
from baton.engine.handoff import ChunkDone
from baton.engine.step_output import StepOutput
from baton.simulator.cluster_config import ClusterConfig
from baton.simulator.door import Door, Visitor
from baton.simulator.events import EventQueue
from baton.simulator.fleet import build_worker, build_workers, with_links_of
from baton.simulator.host import Host
from baton.simulator.outcome import Outcome
from baton.simulator.router import SimRouter
from baton.simulator.worker import SimWorker
from baton.simulator.workload import Arrival
from services.router.placement.placement import Placement, PlacementKind

TOKEN_ID = 1
_STARTS = (Event.PREFILL_QUEUED, Event.PREFILL_STARTED, Event.DECODE_STARTED)
GOSSIP_S = 0.005
"""Until the other copies of the router know of a placement."""


@dataclass(slots=True)
class _Running:
    """A request on its way."""

    arrival: Arrival
    router: SimRouter
    placement: Placement
    outcome: Outcome
    visitor: Visitor
    open_on: set[WorkerId] = field(default_factory=set)
    """Workers that have not said their last word."""
    first: TokenDelta | None = None
    is_reserved: bool = False
    num_reserved_cached: int = 0
    timeline: Timeline = field(default_factory=Timeline)


class SimCluster:
    """`run` a workload once. Implements WorkerListener."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self.events = EventQueue()
        self._rng = random.Random(config.seed)
        workers = build_workers(config, self.events, listener=self)
        self._hosts: list[Host] = []
        self._num_hosted = 0
        for worker in workers:
            self._give_host(worker)
        self._layout = workers[0].info.layout
        self.workers = {worker.worker_id: worker for worker in workers}
        self.routers = [
            SimRouter(with_links_of(config.hardware, config.policy), seed=config.seed + 1 + i)
            for i in range(config.num_routers)
        ]
        self.doors = [
            Door(router, self.events, config, start=self._start) for router in self.routers
        ]
        for router in self.routers:
            for worker in workers:
                router.join(worker.info, worker.engine.load())
        self._running: dict[RequestId, _Running] = {}
        self._num_ended = 0
        self._progress: Callable[[int], None] | None = None

    def run(
        self,
        arrivals: Sequence[Arrival],
        *,
        progress: Callable[[int], None] | None = None,
        on_outcomes: Callable[[Sequence[Outcome]], None] | None = None,
    ) -> list[Outcome]:
        """All requests to their end; `progress` is called with the number that have ended.

        `on_outcomes` gets the outcomes at the start, one for each arrival, to look at while they
        are filled in. Raises AssertionError when something is left over on a worker.
        """
        outcomes = [Outcome(a.number, a.at_s, a.num_prompt_tokens) for a in arrivals]
        for arrival, outcome in zip(arrivals, outcomes, strict=True):
            self.events.at(arrival.at_s, lambda a=arrival, o=outcome: self._arrive(a, o))  # type: ignore[misc]
        self._progress = progress
        if on_outcomes is not None:
            on_outcomes(outcomes)
        while self.events.step():
            pass
        self.check_idle()
        return outcomes

    def add_worker(self, name: str, role: Role) -> SimWorker:
        """It takes requests from now on. Raises ValueError for a name that was used before."""
        if WorkerId(name) in self.workers:
            raise ValueError(f"worker {name} was there before")
        worker = build_worker(name, role, self._config, self.events, listener=self)
        self._give_host(worker)
        self.workers[worker.worker_id] = worker
        for router in self.routers:
            router.join(worker.info, worker.engine.load())
        for door in self.doors:
            door.look()
        return worker

    def drain_worker(self, worker_id: WorkerId) -> None:
        """It gets nothing new and ends what it has; `engine.is_empty` says when that is done."""
        for router in self.routers:
            router.drain(worker_id)

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Raises ValueError while it holds something. Its figures stay in `workers`."""
        if not self.workers[worker_id].engine.is_empty:
            raise ValueError(f"worker {worker_id} still has requests: drain it first")
        for router in self.routers:
            router.leave(worker_id)

    def check_idle(self) -> None:
        """Raises AssertionError when a request, lease or reservation is left."""
        assert not self._running, f"{len(self._running)} requests never ended"
        for door in self.doors:
            door.check_idle()
        for worker in self.workers.values():
            assert worker.engine.is_empty, f"{worker.worker_id} still holds something"
            worker.engine.check_integrity()

    def _give_host(self, worker: SimWorker) -> None:
        """The next place on a host that several share; its own where hosts have one worker."""
        per_host = self._config.workers_per_host
        if per_host > 1:
            if self._num_hosted % per_host == 0:
                self._hosts.append(Host(self.events))
            worker.host = self._hosts[-1]
            self._num_hosted += 1

    # A request's way.

    def _arrive(self, arrival: Arrival, outcome: Outcome) -> None:
        number = self._rng.randrange(len(self.routers))
        visitor = Visitor(arrival, outcome, self.routers[number])
        hardware = self._config.hardware
        outside_s = hardware.request_s + hardware.request_token_s * arrival.num_prompt_tokens
        if outside_s:
            self.events.after(outside_s, lambda: self.doors[number].enter(visitor))
        else:
            self.doors[number].enter(visitor)

    def _start(self, visitor: Visitor, placement: Placement) -> None:
        arrival, outcome, router = visitor.arrival, visitor.outcome, visitor.router
        now_s = self.events.now()
        request_id = RequestId(f"r{arrival.number}")
        outcome.kind = placement.kind.value
        outcome.prefill, outcome.decode = placement.prefill or "", placement.decode or ""
        outcome.placed_s = now_s
        outcome.predicted_ttft_s = placement.predicted.ttft_s if placement.predicted else None
        open_on = set(placement.workers)
        running = _Running(arrival, router, placement, outcome, visitor, open_on)
        running.timeline.record(Event.PLACED, now_s)
        self._running[request_id] = running
        router.sent(
            request_id,
            placement,
            arrival.block_hashes,
            num_prompt_tokens=arrival.num_prompt_tokens,
            session_key=arrival.session_key,
            now_s=now_s,
        )
        self._tell_others(request_id, running)
        self.events.after(
            self._config.hardware.message_s, lambda: self._submit(request_id, running)
        )

    def _tell_others(self, request_id: RequestId, running: _Running) -> None:
        for router in self.routers:
            if router is not running.router:
                self.events.after(
                    GOSSIP_S,
                    lambda r=router: r.sent_by_other(  # type: ignore[misc]
                        request_id,
                        running.placement,
                        running.arrival.block_hashes,
                        num_prompt_tokens=running.arrival.num_prompt_tokens,
                        now_s=self.events.now(),
                    ),
                )

    def _submit(self, request_id: RequestId, running: _Running) -> None:
        placement = running.placement
        if placement.kind is PlacementKind.REMOTE_PREFILL:
            assert placement.decode is not None
            self._give(placement.decode, self._request(request_id, running, Work.DECODE))
        if not self._fetch(request_id, running):
            self._start_prompt(request_id, running)

    def _start_prompt(self, request_id: RequestId, running: _Running) -> None:
        is_remote = running.placement.kind is PlacementKind.REMOTE_PREFILL
        work = Work.PREFILL if is_remote else Work.GENERATE
        request = self._request(request_id, running, work)
        self._give(running.placement.computes_prompt, request)

    def _fetch(self, request_id: RequestId, running: _Running) -> bool:
        """Read the offered prefix first, where that is faster than computing it."""
        offer = running.placement.offer
        if offer is None:
            return False
        reader = self.workers[running.placement.computes_prompt]
        owner = self.workers[offer.source]
        hashes = running.arrival.block_hashes[: offer.num_blocks]
        block_size = self._config.block_size
        num_missing = (offer.num_blocks - offer.num_own_blocks) * block_size
        context = offer.num_own_blocks * block_size
        compute_s = running.router.perf.prefill_s(
            reader.info.role, num_missing, context, reader.worker_id
        )
        if self._move_s(num_missing) >= compute_s:
            return False
        fetch_id = RequestId(f"{request_id}.fetch")
        leased = owner.engine.lease_prefix(fetch_id, hashes)
        reservation = reader.engine.reserve_import(fetch_id, hashes[: len(leased)])
        if reservation is None:
            owner.engine.release_lease(fetch_id)
            return False
        num_tokens = (len(reservation.block_ids) - reservation.num_cached_blocks) * block_size

        def arrived() -> None:
            owner.engine.release_lease(fetch_id)
            reader.engine.finish_import(fetch_id, num_blocks=len(reservation.block_ids))
            running.outcome.num_fetched_tokens = num_tokens
            self._start_prompt(request_id, running)
            owner.kick()

        self.events.after(self._move_s(num_tokens), arrived)
        return True

    def _request(self, request_id: RequestId, running: _Running, work: Work) -> GenerateRequest:
        arrival, source = running.arrival, None
        if work is Work.DECODE:
            info = self.workers[running.placement.computes_prompt].info
            source = PeerRef(info.worker_id, info.epoch, info.address)
        return GenerateRequest(
            request_id,
            work,
            (TOKEN_ID,) * arrival.num_prompt_tokens,
            SamplingParams(max_tokens=arrival.num_output_tokens, temperature=0.0, ignore_eos=True),
            block_hashes=arrival.block_hashes,
            kv_source=source,
        )

    def _give(self, worker_id: WorkerId, request: GenerateRequest) -> None:
        worker = self.workers[worker_id]
        worker.engine.submit(request)
        worker.kick()

    # WorkerListener

    def on_step(self, worker: SimWorker, output: StepOutput) -> None:
        load, now_s = worker.engine.load(), self.events.now()
        hears = self._gets_tokens(output.deltas)
        for router in self.routers:
            router.heard(
                worker.worker_id,
                load,
                output.stored,
                output.removed,
                now_s,
                has_tokens=router in hears,
            )
        for reservation in output.reservations:
            running = self._running[reservation.request_id]
            running.is_reserved = True
            running.num_reserved_cached = reservation.num_cached_blocks
            self._hand_over(reservation.request_id, running)
        for delta in output.deltas:
            self._on_delta(worker, delta, now_s)
        for chunk in output.chunks:
            self._on_chunk(chunk)
        for door in self.doors:
            door.look()

    def _gets_tokens(self, deltas: Sequence[TokenDelta]) -> Collection[SimRouter]:
        """Router copies that requests of these deltas came through."""
        if len(self.routers) == 1:
            return self.routers if any(delta.token_ids for delta in deltas) else ()
        return {self._running[delta.request_id].router for delta in deltas if delta.token_ids}

    def _on_delta(self, worker: SimWorker, delta: TokenDelta, now_s: float) -> None:
        running = self._running[delta.request_id]
        outcome = running.outcome
        if delta.token_ids:
            if not outcome.num_output_tokens:
                outcome.first_token_s = now_s
                outcome.num_cached_tokens = delta.num_cached_tokens
                running.timeline.record(Event.PREFILL_ENDED, now_s)
                running.timeline.record(Event.FIRST_TOKEN, now_s)
            outcome.num_output_tokens += len(delta.token_ids)
            outcome.last_token_s = now_s
        if delta.finish_reason is None and delta.timeline is None:
            return
        assert delta.finish_reason is not FinishReason.ERROR, delta.error
        if delta.timeline is not None:
            # Ends come from here: the engine's step is over in no time, as its clock sees it.
            starts = {e: s for e, s in delta.timeline.points.items() if e in _STARTS}
            running.timeline.merge(Timeline(starts))
            running.open_on.discard(worker.worker_id)
            running.router.ended(delta.request_id, worker.worker_id)
        if delta.finish_reason is not None:
            self._end(delta.request_id, running)

    def _on_chunk(self, chunk: ChunkDone) -> None:
        running = self._running.get(chunk.request_id)
        if chunk.is_last and running is not None:
            running.first = chunk.first_token
            self._hand_over(chunk.request_id, running)
        elif chunk.is_last:
            self._release(chunk.request_id)

    def _hand_over(self, request_id: RequestId, running: _Running) -> None:
        """Both sides are ready: only what the last chunk wrote is still to be read."""
        if running.first is None or not running.is_reserved:
            return
        config, arrival = self._config, running.arrival
        num_new = arrival.num_prompt_tokens - running.num_reserved_cached * config.block_size
        running.outcome.num_handed_tokens = max(0, num_new)
        num_left = min(max(0, num_new), config.prefill_max_num_batched_tokens)
        self.events.after(self._move_s(num_left), lambda: self._activate(request_id, running))

    def _activate(self, request_id: RequestId, running: _Running) -> None:
        placement, first = running.placement, running.first
        assert placement.decode is not None and placement.prefill is not None and first is not None
        decode, prefill = self.workers[placement.decode], self.workers[placement.prefill]
        told = TokenDelta(request_id, 0, list(first.token_ids), finish_reason=first.finish_reason)
        decode.engine.activate(request_id, told)
        prefill.engine.release_lease(request_id)
        decode.kick()
        prefill.kick()

    def _end(self, request_id: RequestId, running: _Running) -> None:
        outcome = running.outcome
        if running.placement.kind is not PlacementKind.PREFILL_ONLY:
            running.timeline.record(Event.DECODE_ENDED, outcome.last_token_s)
        running.router.learn(
            running.placement,
            running.timeline,
            num_prompt_tokens=outcome.num_prompt_tokens,
            num_cached_tokens=outcome.num_cached_tokens,
            num_output_tokens=outcome.num_output_tokens,
        )
        for worker_id in running.open_on:
            # A prefill whose first token was the last: the decode worker gives its blocks back.
            self.workers[worker_id].engine.cancel(request_id)
            running.router.ended(request_id, worker_id)
        del self._running[request_id]
        running.visitor.leave()
        self._num_ended += 1
        if self._progress is not None:
            self._progress(self._num_ended)

    def _release(self, request_id: RequestId) -> None:
        for worker in self.workers.values():
            worker.engine.release_lease(request_id)

    def _move_s(self, num_tokens: int) -> float:
        return self._config.hardware.move_s(num_tokens * self._layout.token_bytes)
