"""Changes of a worker's role while it runs: who it is, and the steps of a change.

 1. check: the settings of the other pool fit this process, and the old pool keeps a worker
 2. leave: take no more work, hand back what has not begun; routers move what generates
 3. wait until no request is left. Leases that are still read go on: they hold blocks, no role
 4. switch: step limits, role and version, then tell the routers, and take work again

Weights, links, prefix cache and sessions stay. What fails, or is late, leaves the worker as it was;
nothing is ended for a change. A change goes on to its end though nobody waits for it any more.

Does not know: gRPC.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging

from baton.core.clock import Clock
from baton.core.errors import BatonError, InvalidRequest, RoleChangeRefused, Unavailable
from baton.core.logging import log_fields
from baton.core.request import RequestId
from baton.core.worker_info import Role, WorkerInfo
from baton.engine.config import EngineConfig
from baton.engine.scheduler import SchedulerLimits
from services.worker.engine_loop import EngineLoop
from services.worker.pool_mates import PoolMates
from services.worker.requests import Requests
from services.worker.role_settings import limits_in, limits_of
from services.worker.role_state import Asked, Outcome, RoleMachine, RoleState
from services.worker.session import Sessions

logger = logging.getLogger(__name__)

POLL_S = 0.02
ANSWER_S = 0.5
"""The engine answers between two steps."""
READ_PATIENCE_S = 1.0
"""For KV that is on its way. What has not come by then may wait behind a queue elsewhere."""
LEAVES = "the worker leaves its pool"
MAX_TIMEOUT_S = 3600.0


class RoleChanger:
    """Of one worker. Runs on the event loop."""

    def __init__(
        self,
        info: WorkerInfo,
        roles: RoleMachine,
        *,
        engine_config: EngineConfig,
        other_engine: EngineConfig | None,
        engine: EngineLoop,
        requests: Requests,
        sessions: Sessions,
        clock: Clock,
        fixed_because: str = "",
    ) -> None:
        """`fixed_because`: why this worker never changes its role, empty where it may."""
        self._info = info
        self._announced = info
        self._roles = roles
        self._first_role = info.role
        self._engine_config = engine_config
        self._other_engine = other_engine
        self._engine = engine
        self._requests = requests
        self._sessions = sessions
        self._clock = clock
        self._fixed_because = fixed_because
        self._mates: PoolMates | None = None
        self._changing: asyncio.Task[WorkerInfo] | None = None

    def attach(self, mates: PoolMates) -> None:
        """Who else there is, known once the worker announces itself."""
        self._mates = mates

    @property
    def info(self) -> WorkerInfo:
        """Who this worker is, towards routers."""
        return self._info

    @property
    def announced(self) -> WorkerInfo:
        """Who it is towards the registries: of the new pool as soon as a change begins."""
        return self._announced

    async def change(
        self, target: Role, *, timeout_s: float, may_empty_pool: bool = False
    ) -> WorkerInfo:
        """Serve as `target` from now on; returns who the worker then is.

        Raises InvalidRequest, RoleChangeRefused, RoleChangeOvertaken, or DeadlineExceeded when
        requests still run after `timeout_s`; then nothing has changed.
        """
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise InvalidRequest(
                f"a change of role may take from 1 ms to {MAX_TIMEOUT_S:g} s, got {timeout_s:g} s",
                param="timeout_ms",
            )
        if self._fixed_because and target is not self._info.role:
            raise RoleChangeRefused(self._fixed_because)
        limits = self._limits(target)
        asked = self._roles.ask(target, deadline_s=self._clock.now() + timeout_s)
        if asked is Asked.HAS_IT:
            return self._info
        if asked is Asked.STARTED:
            work = self._run(target, limits, may_empty_pool=may_empty_pool)
            self._changing = asyncio.create_task(work, name="role change")
            # Its asker may have gone by then.
            self._changing.add_done_callback(lambda task: task.cancelled() or task.exception())
        assert self._changing is not None
        return await asyncio.shield(self._changing)

    async def has_mates(self) -> bool:
        """Whether another worker of the pool takes work; False where nobody can tell."""
        if self._mates is None:
            return False
        try:
            await self._mates.check_some_are_left(self._info, self._info.role)
        except BatonError:
            return False
        return True

    async def close(self) -> None:
        """The worker stops: a change under way ends without effect."""
        if self._changing is not None:
            self._changing.cancel()
            await asyncio.gather(self._changing, return_exceptions=True)

    def _limits(self, target: Role) -> SchedulerLimits:
        if target is self._first_role:
            return limits_of(self._engine_config)
        return limits_in(target, self._engine_config, self._other_engine)

    async def _run(
        self, target: Role, limits: SchedulerLimits, *, may_empty_pool: bool
    ) -> WorkerInfo:
        began_s, before = self._clock.now(), self._info
        log_fields(logger, f"becoming a {target.value} worker", requests=self._requests.num_live)
        after = dataclasses.replace(
            before,
            role=target,
            role_version=self._roles.version + 1,
            max_num_seqs=limits.max_num_seqs,
        )
        outcome: Outcome | None = None
        try:
            outcome = await self._check(after, may_empty_pool=may_empty_pool)
            if outcome is None:
                outcome = await self._leave()
        finally:
            if outcome is None:
                # Cancelled, or a defect of ours: the worker must not stay between two roles.
                self._roles.give_up(Unavailable("the change was broken off"))
            if outcome is None or outcome.error is not None:
                self._announced = before
                self._requests.repeat_load()
        if outcome.error is not None:
            await self._announce(before)
            logger.warning("stays a %s worker: %s", before.role.value, outcome.error)
            raise outcome.error
        self._switch(after, limits)
        seconds = round(self._clock.now() - began_s, 3)
        log_fields(
            logger,
            f"is a {target.value} worker now",
            now_in=target.value,
            role_version=after.role_version,
            seconds=seconds,
        )
        return after

    async def _check(self, after: WorkerInfo, *, may_empty_pool: bool) -> Outcome | None:
        """None: go on. The registries count the worker to its new pool from here on."""
        self._announced = after
        try:
            if self._mates is None:
                raise RoleChangeRefused("the worker has not started yet; ask again")
            if may_empty_pool:
                await self._announce(after)
            else:
                await self._mates.announce(after)
                await self._mates.check_some_are_left(after, self._info.role)
        except Unavailable as error:
            refused = RoleChangeRefused(
                f"the registry does not answer ({error}), so nobody can tell whether the "
                f"{self._info.role.value} pool keeps a worker; ask again, or with --may-empty-pool"
            )
            return self._roles.give_up(refused) or self._overtaken()
        except BatonError as error:
            return self._roles.give_up(error) or self._overtaken()
        self._roles.leave()
        self._requests.repeat_load()
        return None

    async def _leave(self) -> Outcome:
        """Until no request of the old role is left, or the change is over otherwise."""
        patience_until_s = self._clock.now() + READ_PATIENCE_S
        while True:
            if self._roles.state is not RoleState.LEAVING:
                return self._overtaken()
            outcome = self._roles.look(self._clock.now(), num_live=self._requests.num_live)
            if outcome is not None:
                return outcome
            waiting: tuple[RequestId, ...] = ()
            try:
                async with asyncio.timeout(ANSWER_S):
                    waiting = await self._engine.waiting_ids()
            except TimeoutError:
                # In a long step. The deadline is looked at meanwhile.
                continue
            except Unavailable as error:
                return self._roles.give_up(error) or self._overtaken()
            if self._roles.state is RoleState.LEAVING:
                self._requests.hand_back_waiting(waiting, LEAVES)
                if self._clock.now() > patience_until_s:
                    self._requests.hand_back_reserved(LEAVES)
            await asyncio.sleep(POLL_S)

    def _overtaken(self) -> Outcome:
        """The worker began to leave for good meanwhile."""
        outcome = self._roles.take_overtaken()
        assert outcome is not None, "a change ends with an outcome"
        return outcome

    def _switch(self, after: WorkerInfo, limits: SchedulerLimits) -> None:
        """At once: no work comes in between."""
        self._engine.set_limits(limits)
        self._info = self._announced = after
        self._sessions.broadcast_info(after)
        self._requests.repeat_load()

    async def _announce(self, info: WorkerInfo) -> None:
        """As far as the registries answer; `registration` goes on trying."""
        if self._mates is None:
            return
        try:
            await self._mates.announce(info)
        except BatonError as error:
            logger.info("the registry hears of the role later: %s", error)
