"""A deployment for planners: router copies as sums, pools that obey orders, virtual time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from baton.core.worker_info import Role
from made_up_worker import MODEL
from services.planner.actuator import PlannedWorker, WorkerPhase
from services.planner.corrections import predicted_prefill_s, predicted_step_s
from services.planner.stats_source import Reading
from services.router.pool_stats import DecodeSums, PoolMoment, PoolStats, PrefillSums

PROMPT_TOKENS, OUTPUT_TOKENS = 512, 64


@dataclass
class World:
    """Both a `StatsSource` and a `PoolActuator`."""

    num_copies: int = 2
    start_s: float = 30.0
    drain_s: float = 20.0
    rate_per_s: float = 1.0
    prompt_tokens: int = PROMPT_TOKENS
    output_tokens: int = OUTPUT_TOKENS
    ttft_share: float = 1.0
    itl_share: float = 1.0
    num_queued: float = 0.0
    """At each copy."""
    slowness: float = 1.0
    """Measured seconds by those of `made_up_worker.MODEL`."""
    ttft_s: float = 0.4
    itl_s: float = 0.04
    now_s: float = 0.0
    pool: dict[str, PlannedWorker] = field(default_factory=dict)
    copies: dict[str, PoolStats] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    """Copies that do not answer."""
    log: list[str] = field(default_factory=list)
    _due: dict[str, float] = field(default_factory=dict)
    _next: int = 0

    def __post_init__(self) -> None:
        for role in Role:
            self.start(role)
        self.pool = {
            name: dataclasses.replace(w, phase=WorkerPhase.READY) for name, w in self.pool.items()
        }
        self._due.clear()
        self.log.clear()
        for i in range(self.num_copies):
            self.copies[f"router-{i}"] = PoolStats(
                0.0, ttft_target_s=self.ttft_s, itl_target_s=self.itl_s
            )

    def pass_time(self, seconds: float) -> None:
        """Requests come and end, workers start and go."""
        self.now_s += seconds
        for name, at_s in list(self._due.items()):
            if at_s > self.now_s:
                continue
            del self._due[name]
            worker = self.pool[name]
            if worker.phase is WorkerPhase.DRAINING:
                del self.pool[name]
            else:
                self.pool[name] = dataclasses.replace(
                    worker, phase=WorkerPhase.READY, joined_s=self.now_s
                )
        for name, stats in self.copies.items():
            num = self.rate_per_s * seconds / len(self.copies)
            self.copies[name] = self._later(stats, seconds, num)

    def restart_copy(self, name: str) -> None:
        old = self.copies[name]
        self.copies[name] = PoolStats(
            0.0, ttft_target_s=old.ttft_target_s, itl_target_s=old.itl_target_s
        )

    # A StatsSource.

    def read(self) -> Reading:
        answering = {n: s for n, s in self.copies.items() if n not in self.silent}
        return Reading(answering, dict.fromkeys(self.silent & self.copies.keys(), "no answer"))

    # A PoolActuator.

    def workers(self) -> list[PlannedWorker]:
        return list(self.pool.values())

    def start(self, role: Role) -> None:
        name = f"{role.value}-{self._next}"
        self._next += 1
        self.pool[name] = PlannedWorker(name, role, WorkerPhase.STARTING)
        self._due[name] = self.now_s + self.start_s
        self.log.append(f"start {role.value}")

    def drain(self, worker_name: str) -> None:
        worker = self.pool[worker_name]
        assert worker.phase is not WorkerPhase.DRAINING
        self.pool[worker_name] = dataclasses.replace(worker, phase=WorkerPhase.DRAINING)
        self._due[worker_name] = self.now_s + self.drain_s
        self.log.append(f"drain {worker_name}")

    def change_role(self, worker_name: str, role: Role) -> None:
        worker = self.pool[worker_name]
        assert worker.phase is WorkerPhase.READY and worker.role is not role
        self.pool[worker_name] = dataclasses.replace(worker, role=role, phase=WorkerPhase.STARTING)
        self._due[worker_name] = self.now_s + 2.0
        self.log.append(f"change_role {worker_name}")

    def count(self, role: Role) -> int:
        """Workers that stay."""
        return sum(
            w.role is role and w.phase is not WorkerPhase.DRAINING for w in self.pool.values()
        )

    def _later(self, stats: PoolStats, seconds: float, num: float) -> PoolStats:
        prompt, output = self.prompt_tokens, self.output_tokens
        pairs = prompt**2 / 2
        held = output * (prompt + output / 2)
        prefill, decode = stats.prefill_steps, stats.decode_steps
        prompt_s = predicted_prefill_s(MODEL, PrefillSums(1, prompt, pairs))
        step_s = predicted_step_s(MODEL, DecodeSums(1, 4, 2000))
        return dataclasses.replace(
            stats,
            uptime_s=stats.uptime_s + seconds,
            num_queued=self.num_queued,
            num_arrived=stats.num_arrived + num,
            num_prompts=stats.num_prompts + num,
            uncached_tokens=stats.uncached_tokens + num * prompt,
            pairs=stats.pairs + num * pairs,
            num_ended=stats.num_ended + num,
            output_tokens=stats.output_tokens + num * output,
            held_tokens=stats.held_tokens + num * held,
            ttft_met=stats.ttft_met + num * self.ttft_share,
            ttft_measured=stats.ttft_measured + num,
            itl_met=stats.itl_met + num * self.itl_share,
            itl_measured=stats.itl_measured + num,
            prefill_steps=PrefillSums(
                prefill.num + num,
                prefill.tokens + num * prompt,
                prefill.pairs + num * pairs,
                prefill.engine_s + num * prompt_s * self.slowness,
            ),
            decode_steps=DecodeSums(
                decode.num + num,
                decode.batch + num * 4,
                decode.kv_tokens + num * 2000,
                decode.step_s + num * step_s * self.slowness,
            ),
            prefill=self._moment(Role.PREFILL),
            decode=self._moment(Role.DECODE),
        )

    def _moment(self, role: Role) -> PoolMoment:
        mine = [w for w in self.pool.values() if w.role is role]
        ready = [w for w in mine if w.phase is WorkerPhase.READY]
        return PoolMoment(
            num_ready=len(ready),
            num_draining=sum(w.phase is WorkerPhase.DRAINING for w in mine),
            kv_usage=0.3,
            youngest_s=min((min(self.now_s, self.now_s - w.joined_s) for w in ready), default=0.0),
        )
