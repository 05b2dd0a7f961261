"""Moves running requests between workers: looks, decides by `migration`, asks, follows.

    load reports, running requests ──► MigrationPlanner ──► Attempt.take_over on the target
    settled Handover ──► planner (rests), counter, log line, the request's record

Looks once a period, and at once when a move has settled, so that a drain goes on without pauses.
How both workers settle it between themselves is theirs; a target that produces nothing in time is
told to give up, and the source goes on.

Does not know: text, retries, how KV is read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from baton.core import metrics as series
from baton.core.errors import WorkerLost
from baton.core.logging import log_fields
from baton.core.worker_info import Epoch, WorkerId
from baton.telemetry.metrics import Metrics
from services.router.config import MigrationConfig
from services.router.migration.handover import Handover, HandoverState
from services.router.migration.migration import MigrationPlanner, Move, RunningRequest
from services.router.placement.placer import worker_deadline_s
from services.router.requests.attempt import Attempt
from services.router.requests.flight import Flight
from services.router.workers.worker_pool import WorkerPool

logger = logging.getLogger(__name__)

JUDGE_S = 0.05
"""A target that fails because the request has just ended on its source may be heard before the
source is: this much later it shows."""


class _Going(NamedTuple):
    move: Move
    flight: Flight
    attempt: Attempt


class Migrator:
    """Runs on the event loop of the requests."""

    def __init__(
        self,
        *,
        pool: WorkerPool,
        flights: Collection[Flight],
        metrics: Metrics,
        config: MigrationConfig,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`flights`: those alive now, changed by their owner."""
        self._pool = pool
        self._flights = flights
        self._metrics = metrics
        self._config = config
        self._wall_clock = wall_clock
        self._planner = MigrationPlanner(config)
        self._under_way: dict[Handover, _Going] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._config.enabled:
            self._task = asyncio.create_task(self._run(), name="migration")

    async def stop(self) -> None:
        """Begin no more moves. Those under way go on with their requests."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                self._look()
            except Exception:
                # Requests do not depend on being moved.
                logger.exception("migration failed to look; trying again")
                await asyncio.sleep(self._config.period_s)
            try:
                async with asyncio.timeout(self._config.period_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _look(self) -> None:
        now_s = asyncio.get_running_loop().time()
        self._give_up_late(now_s)
        view = self._pool.view(with_leaving=True)
        sources = self._planner.sources(view)
        if not sources or not self._flights:
            return
        movable = {attempt.wire_id: (flight, attempt) for flight, attempt in self._movable(sources)}
        epochs = {(w.info.worker_id, w.info.epoch) for w in view.workers}
        running = [_running(*each, epochs) for each in movable.values()]
        under_way = [going.move for going in self._under_way.values()]
        for move in self._planner.plan(view, running, under_way, now_s):
            self._begin(move, *movable[move.wire_id], now_s)

    def _movable(self, sources: Collection[WorkerId]) -> Iterator[tuple[Flight, Attempt]]:
        for flight in self._flights:
            attempt = flight.attempt
            if (
                attempt is not None
                and flight.abort is None
                and flight.num_tokens_left > 0
                and attempt.generator in sources
                and attempt.can_move
            ):
                yield flight, attempt

    def _begin(self, move: Move, flight: Flight, attempt: Attempt, now_s: float) -> None:
        try:
            target = self._pool.session(move.target)
        except WorkerLost:
            return
        handover = Handover(
            source=move.source,
            target=move.target,
            trigger=move.trigger,
            started_at_s=now_s,
            mailbox=attempt.mailbox,
            unfinished=attempt.unfinished,
            on_settled=self._on_settled,
        )
        # The more of them, the less the target has to leave room for.
        flight.order.output_token_ids = flight.known_token_ids()
        self._under_way[handover] = _Going(move, flight, attempt)
        try:
            attempt.take_over(flight.order, handover, target, worker_deadline_s(flight, now_s))
        except WorkerLost:
            del self._under_way[handover]
            return
        flight.record.migrations.append(handover)

    def _give_up_late(self, now_s: float) -> None:
        limit_s = self._config.takeover_timeout_s
        for handover, going in list(self._under_way.items()):
            if now_s - handover.started_at_s > limit_s:
                reason = f"no token within {limit_s:g} s of the takeover"
                going.attempt.give_up_move(reason, at_s=self._wall_clock(), now_s=now_s)

    def _on_settled(self, handover: Handover) -> None:
        going = self._under_way.pop(handover)
        if handover.state is HandoverState.MOVED:
            info = going.attempt.sessions[handover.source].info
            assert info is not None
            num_blocks = info.layout.num_blocks_for(going.move.num_tokens)
            self._planner.moved(going.move, num_blocks, handover.settled_at_s)
        elif handover.state is HandoverState.FAILED:
            self._planner.kept(going.move, handover.settled_at_s)
            loop = asyncio.get_running_loop()
            loop.call_later(JUDGE_S, self._judge, handover, going)
        if handover.state is not HandoverState.FAILED:
            self._report(handover, going.move, handover.state)
        self._wake.set()

    def _judge(self, handover: Handover, going: _Going) -> None:
        """Whether it was the target that failed, or the request or its source that had ended."""
        has_ended = going.flight.record.finish_reason is not None
        if has_ended or not going.attempt.sessions[handover.source].is_ready:
            self._report(handover, going.move, HandoverState.VOID)
            return
        self._planner.target_failed(going.move, handover.settled_at_s)
        logger.warning(
            "takeover of %s from %s by %s failed: %s",
            going.move.wire_id, handover.source, handover.target, handover.failure,
        )  # fmt: skip
        self._report(handover, going.move, HandoverState.FAILED)

    def _report(self, handover: Handover, move: Move, state: HandoverState) -> None:
        self._metrics.add(series.MIGRATIONS, 1, move.trigger.value, state.value)
        log_fields(
            logger,
            f"takeover {state.value}",
            request_id=move.wire_id,
            source=move.source,
            target=move.target,
            trigger=move.trigger.value,
            reason=move.reason,
            failure=handover.failure,
            tokens=move.num_tokens,
            seconds=round(handover.seconds, 6),
        )


def _running(
    flight: Flight, attempt: Attempt, epochs: Collection[tuple[WorkerId, Epoch]]
) -> RunningRequest:
    return RunningRequest(
        attempt.wire_id,
        attempt.generator,
        num_tokens=len(flight.request.prompt_token_ids) + flight.stream.next_index,
        num_tokens_left=flight.num_tokens_left,
        barred=frozenset(w for w, epoch in attempt.silenced if (w, epoch) in epochs),
    )
