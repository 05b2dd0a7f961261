"""Which use of the devices serves most requests per device within the objective.

    each pool alone ─► its rate ─► pairs of sizes and counts by the slower side
    the best of them simulated whole ─► ranked beside colocated workers

A pool alone says which counts fit together; the ranking is by whole clusters only, since workers
that share a queue do better than one by one. Does not know: files, terminals.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import gcd

from baton.core.errors import ConfigError
from services.planner.candidate import Candidate, Layout, Pool, alone, cluster_of
from services.planner.goodput import MIN_REQUESTS, SPAN_S, Goodput, GoodputSearch
from services.planner.objective import Objective, Reached
from services.planner.pool_model import PoolModel
from services.planner.workload import Workload
from services.router.placement.policy_config import PolicyConfig

NUM_WHOLE = 4
"""Disaggregated candidates that are simulated whole."""
CHUNK_TOKENS = (256, 512, 1024)
PREFILL_STEP_TOKENS = 2048
NO_LOCAL_PREFILL = PolicyConfig(local_prefill_max_tokens=0)


@dataclass(frozen=True, slots=True)
class Question:
    """What a plan is to answer."""

    workload: Workload
    objective: Objective
    prefill_models: dict[int, PoolModel]
    """Workers that can be had, by tensor-parallel size; likewise for decoding."""
    decode_models: dict[int, PoolModel]
    layout: Layout
    max_devices: int
    seed: int = 0
    min_requests: int = MIN_REQUESTS
    span_s: float = SPAN_S
    """Of virtual time; both bound each simulation from below."""

    def __post_init__(self) -> None:
        if self.max_devices < 1:
            raise ConfigError(f"a plan needs at least 1 device, got {self.max_devices}")
        if not self.prefill_models or not self.decode_models:
            raise ConfigError("no size of worker to choose from")
        longest = self.workload.max_tokens
        for name, models in (("prefill", self.prefill_models), ("decode", self.decode_models)):
            if not _within(models, self.max_devices):
                raise ConfigError(
                    f"{name} workers need at least {min(models)} devices and {self.max_devices} "
                    "may be used: raise that, or take figures of smaller workers"
                )
            if not _fitting(models, self.max_devices, longest):
                room = max(m.max_kv_tokens for m in _within(models, self.max_devices))
                raise ConfigError(
                    f"the longest request has {longest} tokens, the largest {name} worker on "
                    f"{self.max_devices} devices has room for the KV of {room}: take more or "
                    "larger devices, or leave out what is longer"
                )


@dataclass(frozen=True, slots=True)
class Ranked:
    """One candidate and what it serves."""

    title: str
    candidate: Candidate
    goodput: Goodput
    reason: str
    """Why not more."""
    is_prefill: bool | None = None
    """Of a pool alone, which one it is."""

    @property
    def rate_per_device(self) -> float:
        return self.goodput.rate_per_s / self.candidate.num_devices


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A target that cannot be kept at any rate."""

    target: str
    wanted_s: float
    best_s: float
    """What the best pool gives the wanted share of requests, one at a time."""
    best: Ranked


@dataclass(frozen=True, slots=True)
class Plan:
    ranking: tuple[Ranked, ...]
    """Best first, by requests per second and device."""
    pools_alone: tuple[Ranked, ...]

    @property
    def chosen(self) -> Ranked | None:
        """None when nothing keeps the objective."""
        best = self.ranking[0] if self.ranking else None
        return best if best is not None and best.goodput.rate_per_s > 0 else None

    def shortfalls(self, objective: Objective) -> tuple[Shortfall, ...]:
        """Targets that no pool keeps even with one request at a time, TTFT first."""
        # A pool alone stands beside one that takes no time, so what it misses is its own.
        prefill = [r for r in self.pools_alone if r.is_prefill is True]
        decode = [r for r in self.pools_alone if r.is_prefill is False]
        found = []
        if not any(ranked.goodput.rate_per_s for ranked in prefill):
            best = min(prefill, key=lambda ranked: _lonely(ranked).ttft_s)
            found.append(Shortfall("TTFT", objective.ttft_s, _lonely(best).ttft_s, best))
        if not any(ranked.goodput.rate_per_s for ranked in decode):
            best = min(decode, key=lambda ranked: _lonely(ranked).itl_s)
            found.append(Shortfall("ITL", objective.itl_s, _lonely(best).itl_s, best))
        return tuple(found)


Progress = Callable[[str], None]


def search(question: Question, *, on_run: Progress = lambda _: None) -> Plan:
    """`on_run` is told what is simulated, before each search of a rate."""
    units = _Units(question, on_run)
    whole = [units.rank_whole(pair, rate) for pair, rate in _best_pairs(question, units)]
    colocated = [units.rank_colocated(c) for c in _colocated(question)]
    ranking = sorted(whole + colocated, key=lambda r: -r.rate_per_device)
    return Plan(tuple(ranking), tuple(units.prefill.values()) + tuple(units.decode.values()))


def num_searches(question: Question) -> int:
    """How often `on_run` will be called at most."""
    pools = len(question.prefill_models) + len(question.decode_models)
    return pools + NUM_WHOLE + len(list(_colocated(question)))


class _Units:
    """Pools of one worker, each searched alone."""

    def __init__(self, question: Question, on_run: Progress) -> None:
        self._question, self._on_run = question, on_run
        sizes = {
            is_prefill: _fitting(models, question.max_devices, question.workload.max_tokens)
            for is_prefill, models in (
                (True, question.prefill_models),
                (False, question.decode_models),
            )
        }
        self.prefill = {m.tensor_parallel: self._alone(m, is_prefill=True) for m in sizes[True]}
        self.decode = {m.tensor_parallel: self._alone(m, is_prefill=False) for m in sizes[False]}

    def rank_whole(self, candidate: Candidate, expected: float) -> Ranked:
        return self._search(candidate, candidate.name, expected, PolicyConfig())

    def rank_colocated(self, candidate: Candidate) -> Ranked:
        return self._search(candidate, candidate.name, 1.0 * candidate.num_devices, PolicyConfig())

    def _alone(self, model: PoolModel, *, is_prefill: bool) -> Ranked:
        candidate = alone(
            Pool(model, 1), is_prefill=is_prefill, max_step_tokens=PREFILL_STEP_TOKENS
        )
        name = f"{'prefill' if is_prefill else 'decode'}, tp{model.tensor_parallel}"
        ranked = self._search(candidate, name, 2.0 * model.tensor_parallel, NO_LOCAL_PREFILL)
        return dataclasses.replace(ranked, is_prefill=is_prefill)

    def _search(
        self, candidate: Candidate, name: str, start_rate: float, policy: PolicyConfig
    ) -> Ranked:
        question = self._question
        self._on_run(name)
        searched = GoodputSearch(
            question.workload,
            question.objective,
            seed=question.seed,
            min_requests=question.min_requests,
            span_s=question.span_s,
        )
        config = cluster_of(candidate, question.layout, question.seed, policy)
        goodput = searched.run(config, max(start_rate, 0.01))
        return Ranked(name, candidate, goodput, _reason(goodput, question.objective))


def _best_pairs(question: Question, units: _Units) -> list[tuple[Candidate, float]]:
    """Counts and sizes by the slower side alone, with the rate that this predicts."""
    pairs: list[tuple[float, int, Candidate, float]] = []
    for prefill_tp, prefill in units.prefill.items():
        for decode_tp, decode in units.decode.items():
            for num_prefill, num_decode in _counts(prefill_tp, decode_tp, question.max_devices):
                candidate = Candidate(
                    Pool(question.prefill_models[prefill_tp], num_prefill),
                    Pool(question.decode_models[decode_tp], num_decode),
                    PREFILL_STEP_TOKENS,
                )
                rate = min(
                    num_prefill * prefill.goodput.rate_per_s,
                    num_decode * decode.goodput.rate_per_s,
                )
                devices = candidate.num_devices
                pairs.append((-rate / devices, devices, candidate, rate))
    pairs.sort(key=lambda pair: pair[:2])
    return [(candidate, rate) for _, _, candidate, rate in pairs[:NUM_WHOLE] if rate > 0]


def _counts(prefill_tp: int, decode_tp: int, max_devices: int) -> Iterable[tuple[int, int]]:
    """Ratios in lowest terms: twice as many of both serve about twice as much."""
    for num_prefill in range(1, max_devices // prefill_tp + 1):
        for num_decode in range(1, (max_devices - num_prefill * prefill_tp) // decode_tp + 1):
            if gcd(num_prefill, num_decode) == 1:
                yield num_prefill, num_decode


def _colocated(question: Question) -> Iterable[Candidate]:
    """One worker of each size: prompts in one piece, and in chunks."""
    whole = max(PREFILL_STEP_TOKENS, question.workload.max_tokens)
    longest = question.workload.max_tokens
    for model in _fitting(question.decode_models, question.max_devices, longest):
        yield Candidate(None, Pool(model, 1), whole, is_chunked=False)
        for tokens in CHUNK_TOKENS:
            yield Candidate(None, Pool(model, 1), tokens)


def _within(models: dict[int, PoolModel], max_devices: int) -> list[PoolModel]:
    return [model for size, model in sorted(models.items()) if size <= max_devices]


def _fitting(models: dict[int, PoolModel], max_devices: int, num_tokens: int) -> list[PoolModel]:
    """Those that hold the KV of a request of so many tokens."""
    return [model for model in _within(models, max_devices) if model.max_kv_tokens > num_tokens]


def _lonely(ranked: Ranked) -> Reached:
    lonely = ranked.goodput.lonely
    return Reached(math.inf, math.inf) if lonely is None else lonely.reached


def _reason(goodput: Goodput, objective: Objective) -> str:
    if not goodput.rate_per_s:
        lonely = goodput.lonely
        missed, best_s = "ITL", math.inf if lonely is None else lonely.reached.itl_s
        if goodput.limit == "ttft":
            missed, best_s = "TTFT", math.inf if lonely is None else lonely.reached.ttft_s
        return f"misses {missed} even with one request at a time: {1000 * best_s:.3g} ms"
    above = {
        "ttft": f"above it TTFT exceeds {objective.ttft_s:g} s",
        "itl": f"above it ITL exceeds {1000 * objective.itl_s:g} ms",
    }
    return above.get(goodput.limit, "no limit found")
