"""Policies to compare with: each ignores most of what is known.

    random        any worker that may take work
    round_robin   one after another
    least_loaded  fewest queued prompt tokens, fewest sequences
    prefix_only   most cached blocks of the prompt, whatever the queue, where at least half of them
                  are; as least_loaded otherwise. Decode as least_loaded

Each picks a prefill and a decode worker of one KV layout, never a local prefill while both pools
answer, and offers no prefix to fetch. They do not predict. Equal workers are drawn at random.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from baton.core.tier import Tier
from baton.core.worker_info import Role
from services.router.placement.candidates import Floats, Pool
from services.router.placement.load_book import Column
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import (
    Placement,
    PlacementKind,
    PlacementRequest,
    ScoreTerms,
)
from services.router.placement.policy import (
    CostPolicy,
    Hits,
    Noise,
    PlacementPolicy,
    candidate_pools,
)
from services.router.placement.policy_config import PolicyConfig, PolicyName
from services.router.placement.scoring import lengths_in_pool
from services.router.placement.worker_table import WorkerTable


def make_policy(config: PolicyConfig, perf: PerfModel, rng: random.Random) -> PlacementPolicy:
    """The policy that `config` names."""
    if config.name is PolicyName.COST:
        return CostPolicy(config, perf, Noise(rng))
    pickers: dict[PolicyName, Picker] = {
        PolicyName.RANDOM: RandomPicker(),
        PolicyName.ROUND_ROBIN: RoundRobinPicker(),
        PolicyName.LEAST_LOADED: LeastLoadedPicker(),
        PolicyName.PREFIX_ONLY: PrefixPicker(),
    }
    return ComparisonPolicy(pickers[config.name], rng)


class Scene(NamedTuple):
    """What a picker may look at."""

    pool: Pool
    loads: Floats
    """[column, member]"""
    cached_blocks: NDArray[np.int32]
    """[member]"""
    num_blocks: int
    """Of the prompt that could be cached."""
    rng: random.Random


class Picker(Protocol):
    def pick(self, scene: Scene, role: Role, workers: range) -> int:
        """One of the positions `workers`, which are of `role`."""
        ...


class RandomPicker:
    def pick(self, scene: Scene, role: Role, workers: range) -> int:
        return scene.rng.choice(workers)


class RoundRobinPicker:
    """Remembers the last one of each role, so that workers may come and go."""

    def __init__(self) -> None:
        self._last: dict[Role, str] = {}

    def pick(self, scene: Scene, role: Role, workers: range) -> int:
        order = sorted(workers, key=scene.pool.worker_id)
        last = self._last.get(role, "")
        later = (i for i in order if scene.pool.worker_id(i) > last)
        chosen = next(later, order[0])
        self._last[role] = scene.pool.worker_id(chosen)
        return chosen


class LeastLoadedPicker:
    def pick(self, scene: Scene, role: Role, workers: range) -> int:
        columns = [Column.QUEUED, Column.SEQUENCES]
        if role is not Role.PREFILL:
            columns = [Column.SEQUENCES, Column.RESIDENT]
        loads = scene.loads[columns, workers.start : workers.stop].T.tolist()
        return _lowest([tuple(load) for load in loads], workers, scene.rng)


class PrefixPicker:
    """With a threshold, as prefix-aware routers have: a system prompt that all requests share would
    send all of them to one worker."""

    def __init__(self) -> None:
        self._other = LeastLoadedPicker()

    def pick(self, scene: Scene, role: Role, workers: range) -> int:
        cached = scene.cached_blocks[workers.start : workers.stop].tolist()
        if role is not Role.PREFILL or max(cached) < max(1, scene.num_blocks / 2):
            return self._other.pick(scene, role, workers)
        return _lowest([(-blocks,) for blocks in cached], workers, scene.rng)


class ComparisonPolicy:
    """Implements PlacementPolicy by a picker."""

    def __init__(self, picker: Picker, rng: random.Random) -> None:
        self._picker = picker
        self._rng = rng

    def place(
        self,
        table: WorkerTable,
        pools: Sequence[Pool],
        hits: Sequence[Hits],
        request: PlacementRequest,
    ) -> Placement:
        i, pool = self._rng.choice(candidate_pools(table, pools, request))
        usable = (request.num_prompt_tokens - 1) // pool.layout.block_size
        cached = np.minimum(lengths_in_pool(hits[i].match, pool)[Tier.DISK], usable)
        scene = Scene(pool, pool.loads(), cached, usable, self._rng)
        prefills, decodes = range(pool.num_prefill), range(pool.num_prefill, pool.num_candidates)
        prefill = decode = None
        if prefills:
            prefill = self._picker.pick(scene, Role.PREFILL, prefills)
        if decodes and not (prefills and request.max_tokens == 1):
            decode = self._picker.pick(scene, Role.DECODE, decodes)
        kind = PlacementKind.REMOTE_PREFILL
        if prefill is None or decode is None:
            is_local = prefill is None
            kind = PlacementKind.LOCAL_PREFILL if is_local else PlacementKind.PREFILL_ONLY
        chosen = [position for position in (prefill, decode) if position is not None]
        return Placement(
            kind,
            None if prefill is None else pool.worker_id(prefill),
            None if decode is None else pool.worker_id(decode),
            score=0.0,
            reason="policy for comparison",
            terms=[_terms(scene, position, request.num_prompt_tokens) for position in chosen],
            num_candidates=pool.num_candidates,
        )


def _lowest(keys: Sequence[tuple[float, ...]], workers: range, rng: random.Random) -> int:
    lowest = min(keys)
    return rng.choice([i for i, key in zip(workers, keys, strict=True) if key == lowest])


def _terms(scene: Scene, position: int, num_tokens: int) -> ScoreTerms:
    info = scene.pool.members[position].info
    loads = scene.loads[:, position].tolist()
    cached = int(scene.cached_blocks[position]) * info.layout.block_size
    return ScoreTerms(
        info.worker_id,
        info.role,
        cached=cached,
        uncached=num_tokens - cached,
        queued_prefill=int(loads[Column.QUEUED]),
        resident_kv=int(loads[Column.RESIDENT]),
        num_sequences=int(loads[Column.SEQUENCES]),
        missing_kv=0,
        prefill_cost=0.0,
        decode_cost=0.0,
    )
