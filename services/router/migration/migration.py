"""Which running requests move to another worker, and where. Pure: time is passed in.

    drain      a worker that is ending loses all its requests, those with most left to do first:
               they are the ones it would have to cut off
    pressure   a decode worker below the low watermark of available blocks loses requests until
               the high one is reached, most KV per token still to come first: that frees the most
               blocks here for the least work added there. Those about to end stay

A target must have room for the request and what it generates next, and must not come under
pressure by it; one that is to relieve another keeps the high watermark, so that the two cannot
pass a request back and forth. Whoever failed rests: the request, and the worker it should have
gone to, twice as long with every failure in a row.

Does not know: sessions, text, how KV is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from baton.core.request import RequestId
from baton.core.worker_info import Role, WorkerId
from services.router.config import MigrationConfig
from services.router.migration.cooldown import Cooldowns
from services.router.migration.handover import Trigger
from services.router.workers.cluster_view import ClusterView, WorkerState

GROWTH_TOKENS = 256
"""Room a target must have for what the request generates next, unless it ends before."""
RELIEF_S = 0.5
"""A load report this much later than a move shows the blocks it has freed."""


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """A request that generates on one worker and could move now."""

    wire_id: RequestId
    worker_id: WorkerId
    num_tokens: int
    """Prompt and output: what its KV holds."""
    num_tokens_left: int
    """At most; it may end by itself any time."""
    barred: frozenset[WorkerId] = frozenset()
    """Workers it cannot go to."""


@dataclass(frozen=True, slots=True)
class Move:
    wire_id: RequestId
    source: WorkerId
    target: WorkerId
    trigger: Trigger
    num_tokens: int
    reason: str
    """For the log."""


@dataclass(slots=True)
class _Room:
    """A worker as it will be after the moves decided so far."""

    state: WorkerState
    available: int
    """Blocks."""
    num_sequences: int
    num_leaving: int = 0
    num_coming: int = 0

    @property
    def total(self) -> int:
        return self.state.load.total_blocks

    def num_blocks(self, num_tokens: int) -> int:
        return self.state.info.layout.num_blocks_for(num_tokens)


@dataclass(slots=True)
class MigrationPlanner:
    """Remembers what a view cannot show: who is under pressure, who rests, what was just freed."""

    config: MigrationConfig
    _pressed: set[WorkerId] = field(default_factory=set)
    _requests: Cooldowns[RequestId] = field(init=False)
    _targets: Cooldowns[WorkerId] = field(init=False)
    _stays_until_s: dict[RequestId, float] = field(default_factory=dict)
    _relief: list[tuple[float, WorkerId, int]] = field(default_factory=list)
    """(until when to count it, worker, blocks) of moves that loads do not show yet."""

    def __post_init__(self) -> None:
        limits = (self.config.cooldown_s, self.config.cooldown_max_s)
        self._requests, self._targets = Cooldowns(*limits), Cooldowns(*limits)

    def sources(self, view: ClusterView) -> dict[WorkerId, Trigger]:
        """Workers that requests should leave. Follows the loads of `view` with hysteresis."""
        found: dict[WorkerId, Trigger] = {}
        pressed: set[WorkerId] = set()
        for worker in view.workers:
            worker_id, total = worker.info.worker_id, worker.load.total_blocks
            if not worker.is_readable:
                continue
            if worker.is_ending:
                found[worker_id] = Trigger.DRAIN
                continue
            was_pressed = worker_id in self._pressed
            limit = self.config.high_watermark if was_pressed else self.config.low_watermark
            if worker.info.role is Role.DECODE and worker.available_blocks < limit * total:
                pressed.add(worker_id)
                found[worker_id] = Trigger.PRESSURE
        self._pressed = pressed
        return found

    def plan(
        self,
        view: ClusterView,
        running: Iterable[RunningRequest],
        under_way: Collection[Move],
        now_s: float,
    ) -> list[Move]:
        """Moves to begin now, beside those `under_way`."""
        self._forget_past(now_s)
        sources = self.sources(view)
        if not sources:
            return []
        rooms = self._rooms(view, under_way)
        by_source: dict[WorkerId, list[RunningRequest]] = {}
        for request in running:
            if request.worker_id in sources and not self._requests.is_resting(
                request.wire_id, now_s
            ):
                by_source.setdefault(request.worker_id, []).append(request)
        moves: list[Move] = []
        # Workers that end come first: their requests have nowhere to stay.
        for worker_id in sorted(by_source, key=lambda w: (sources[w] is not Trigger.DRAIN, w)):
            requests = by_source[worker_id]
            if sources[worker_id] is Trigger.DRAIN:
                moves += self._drain(rooms[worker_id], requests, rooms, now_s)
            else:
                moves += self._relieve(rooms[worker_id], requests, rooms, now_s)
        return moves

    def moved(self, move: Move, num_blocks: int, now_s: float) -> None:
        """The target has the request; `num_blocks` become available at the source."""
        self._requests.succeeded(move.wire_id)
        self._targets.succeeded(move.target)
        self._stays_until_s[move.wire_id] = now_s + self.config.min_stay_s
        self._relief.append((now_s + RELIEF_S, move.source, num_blocks))

    def kept(self, move: Move, now_s: float) -> None:
        """The source still has the request."""
        self._requests.failed(move.wire_id, now_s)

    def target_failed(self, move: Move, now_s: float) -> None:
        """It was the target's doing."""
        self._targets.failed(move.target, now_s)

    # Inside.

    def _drain(
        self,
        source: _Room,
        requests: Sequence[RunningRequest],
        rooms: dict[WorkerId, _Room],
        now_s: float,
    ) -> list[Move]:
        moves = []
        for request in sorted(requests, key=lambda r: (-r.num_tokens_left, r.wire_id)):
            move = self._move(request, source, rooms, Trigger.DRAIN, now_s, "the worker is ending")
            if move is not None:
                moves.append(move)
        return moves

    def _relieve(
        self,
        source: _Room,
        requests: Sequence[RunningRequest],
        rooms: dict[WorkerId, _Room],
        now_s: float,
    ) -> list[Move]:
        movable = [
            r
            for r in requests
            if r.num_tokens_left >= max(1, self.config.min_remaining_tokens)
            and r.wire_id not in self._stays_until_s
        ]
        movable.sort(key=lambda r: (-r.num_tokens / r.num_tokens_left, r.wire_id))
        moves = []
        for request in movable:
            if source.available >= self.config.high_watermark * source.total:
                break
            reason = (
                f"{source.available} of {source.total} blocks available; it holds "
                f"{source.num_blocks(request.num_tokens)} for {request.num_tokens_left} tokens"
            )
            move = self._move(request, source, rooms, Trigger.PRESSURE, now_s, reason)
            if move is not None:
                moves.append(move)
        return moves

    def _move(
        self,
        request: RunningRequest,
        source: _Room,
        rooms: dict[WorkerId, _Room],
        trigger: Trigger,
        now_s: float,
        reason: str,
    ) -> Move | None:
        if source.num_leaving >= self.config.max_concurrent:
            return None
        target = self._target(request, source, rooms, trigger, now_s)
        if target is None:
            return None
        target.available -= target.num_blocks(_tokens_soon(request))
        target.num_sequences += 1
        target.num_coming += 1
        source.available += source.num_blocks(request.num_tokens)
        source.num_leaving += 1
        target_id = target.state.info.worker_id
        return Move(
            request.wire_id, request.worker_id, target_id, trigger, request.num_tokens, reason
        )

    def _target(
        self,
        request: RunningRequest,
        source: _Room,
        rooms: dict[WorkerId, _Room],
        trigger: Trigger,
        now_s: float,
    ) -> _Room | None:
        """The worker with most room. One of the prefill pool only where no decode worker is left
        and the source is ending."""
        info = source.state.info
        peers = [
            room
            for worker_id, room in rooms.items()
            if worker_id != info.worker_id
            and room.state.is_eligible
            and room.state.info.model_name == info.model_name
            and room.state.info.layout == info.layout
            and room.state.info.max_model_len >= info.max_model_len
        ]
        decodes = [room for room in peers if room.state.info.role is Role.DECODE]
        if decodes or trigger is Trigger.PRESSURE:
            peers = decodes
        limits = self.config
        keep = limits.low_watermark if trigger is Trigger.DRAIN else limits.high_watermark
        fitting = []
        for room in peers:
            worker_id = room.state.info.worker_id
            left = room.available - room.num_blocks(_tokens_soon(request))
            if (
                left >= max(0, keep * room.total)
                and room.num_sequences < room.state.info.max_num_seqs
                and room.num_coming < limits.max_concurrent
                and worker_id not in request.barred
                and worker_id not in self._pressed
                and not self._targets.is_resting(worker_id, now_s)
            ):
                fitting.append((left / max(1, room.total), -room.num_sequences, worker_id, room))
        return max(fitting, key=lambda each: each[:3])[3] if fitting else None

    def _rooms(self, view: ClusterView, under_way: Collection[Move]) -> dict[WorkerId, _Room]:
        leaving = Counter(move.source for move in under_way)
        coming = Counter(move.target for move in under_way)
        rooms = {
            worker.info.worker_id: _Room(
                worker,
                worker.available_blocks,
                worker.num_sequences,
                leaving[worker.info.worker_id],
                coming[worker.info.worker_id],
            )
            for worker in view.workers
        }
        for move in under_way:
            if (room := rooms.get(move.source)) is not None:
                room.available += room.num_blocks(move.num_tokens)
        for _, worker_id, num_blocks in self._relief:
            if (room := rooms.get(worker_id)) is not None:
                room.available += num_blocks
        return rooms

    def _forget_past(self, now_s: float) -> None:
        self._requests.forget_past(now_s)
        self._targets.forget_past(now_s)
        self._relief = [each for each in self._relief if each[0] > now_s]
        self._stays_until_s = {w: at_s for w, at_s in self._stays_until_s.items() if at_s > now_s}


def _tokens_soon(request: RunningRequest) -> int:
    return request.num_tokens + min(request.num_tokens_left, GROWTH_TOKENS)
