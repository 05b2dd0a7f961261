"""Requests that wait until a part of their prompt's KV has come from a peer or a tier.

    hold ──► plan ──► import ──► plan again ─ ... ─ nothing pays any more ──► released
               └── another request imports the same blocks: wait for that one

 1. hold       a PREFILL or GENERATE request comes. Does the pool lack blocks of its prompt that
               the tiers or the peer named with it have, and is moving them cheaper than computing
               them? Only then is it held.
 2. import     the tiers first, then the peer for what is missing after that: each source once.
               Waiting is bounded by a share of what computing would take; a source that fails
               or is slow costs that time and nothing else.
 3. released   the request goes to the engine and finds the blocks as it finds every prefix.
 x. drop       in any state; an import that nobody waits for any more is stopped.

What the pool caches is known here from the engine's own events, so a decision needs no answer
from the engine. It may be late by a step, which costs a needless import or a needless computation.

Not known here: sessions, streams, how blocks move.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.core.block import BlockHash
from baton.core.fabric import LinkReport
from baton.core.lifecycle import Timeline
from baton.core.request import GenerateRequest, PeerRef, RequestId
from baton.core.worker_info import WorkerId, WorkerInfo
from kvtransfer.fetch_cost import DEFAULT_SECONDS_PER_TOKEN, fetch_pays
from services.worker.kv_import import ImportEngine, KvImport, PrefixReader, TierReader
from services.worker.rates import MeanRate, PrefillRate

logger = logging.getLogger(__name__)

MAX_IMPORTS = 32
"""At the same time; a request beyond it is computed."""
MAX_HELD = 256
MAX_ROUNDS = 4
"""Imports of one request, others' that it waits for included."""
MIN_WAIT_S = 0.1
"""An import may always take this long: below it, the worker's own jitter would decide."""
CLOSE_TIMEOUT_S = 2.0


class Tiers(TierReader, Protocol):
    def restorable(self, block_hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of the chain the tiers have."""
        ...


@dataclass(frozen=True, slots=True)
class ImportLimits:
    """What imports may take."""

    block_size: int
    """Tokens."""
    block_bytes: int
    max_wait_share: float
    """Of the time that computing the same tokens would take."""
    max_wait_s: float


@dataclass(frozen=True, slots=True)
class _Plan:
    """The next import of a request: blocks up to `end` of its chain, from `peer` or the tiers."""

    end: int
    peer: PeerRef | None
    timeout_s: float


@dataclass(slots=True, eq=False)
class _Import:
    work: KvImport
    hashes: tuple[BlockHash, ...]
    """Those that the pool lacked when it began."""
    task: asyncio.Task[None] | None = None
    num_waiting: int = 0


@dataclass(slots=True, eq=False)
class _Held:
    request: GenerateRequest
    hashes: tuple[BlockHash, ...]
    """Of the blocks a request may find cached: its last token is always computed."""
    num_tokens: int
    """Still to be computed as things stand."""
    task: asyncio.Task[None] | None = None
    tried: set[WorkerId | None] = field(default_factory=set)
    """Sources that have had their turn; None for the tiers."""


class PrefixImports:
    """All held requests of one worker. All calls on the event loop."""

    def __init__(
        self,
        *,
        myself: WorkerInfo,
        engine: ImportEngine,
        reads: PrefixReader | None,
        tiers: Tiers | None,
        link: Callable[[WorkerId], LinkReport | None],
        rate: PrefillRate,
        limits: ImportLimits,
        released: Callable[[RequestId], None],
    ) -> None:
        """`reads` None: peers are not asked; `tiers` None: there are none."""
        self._myself = myself
        self._engine = engine
        self._reads = reads
        self._tiers = tiers
        self._link = link
        self._rate = rate
        self._limits = limits
        self._released = released
        self._cached: set[BlockHash] = set()
        self._held: dict[RequestId, _Held] = {}
        self._imports: dict[BlockHash, _Import] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._restored = MeanRate()
        """Bytes from the tiers."""

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def num_held_tokens(self) -> int:
        """Tokens that held requests would have to compute."""
        return sum(held.num_tokens for held in self._held.values())

    @property
    def is_empty(self) -> bool:
        return not self._held and not self._running

    def cache_changed(self, stored: Iterable[BlockHash], removed: Iterable[BlockHash]) -> None:
        """The engine's own news of its prefix cache, in order."""
        self._cached.update(stored)
        self._cached.difference_update(removed)

    def computed(self, num_tokens: int, timeline: Timeline) -> None:
        """A request has ended that had `num_tokens` of its prompt computed here, if any."""
        self._rate.count(num_tokens, timeline)

    def hold(self, request: GenerateRequest) -> bool:
        """False: nothing to wait for. True: `released` or `drop` follows."""
        if len(self._held) >= MAX_HELD or not request.block_hashes:
            return False
        num_known = len(request.prompt_token_ids) + len(request.output_token_ids)
        hashes = request.block_hashes[: (num_known - 1) // self._limits.block_size]
        first = self._num_cached(hashes)
        held = _Held(request, hashes, num_known - first * self._limits.block_size)
        if first == len(hashes):
            return False
        if hashes[first] not in self._imports and self._plan(held, first) is None:
            return False
        self._held[request.request_id] = held
        held.task = self._spawn(self._wait(held))
        return True

    def drop(self, request_id: RequestId) -> None:
        """Nobody wants the request any more; unknown ones are ignored."""
        held = self._held.pop(request_id, None)
        if held is not None and held.task is not None:
            held.task.cancel()

    async def close(self) -> None:
        """Drop everything; waits a bounded time for imports to end."""
        for request_id in list(self._held):
            self.drop(request_id)
        for running in self._imports.values():
            running.work.stop()
        if self._running:
            await asyncio.wait(self._running, timeout=CLOSE_TIMEOUT_S)

    async def _wait(self, held: _Held) -> None:
        request_id = held.request.request_id
        try:
            for _ in range(MAX_ROUNDS):
                if not await self._round(held):
                    break
        except Exception:
            # A defect; the request is computed as if nothing could have been fetched.
            logger.exception("request %s could not be given its prefix", request_id)
        if self._held.pop(request_id, None) is held:
            self._released(request_id)

    async def _round(self, held: _Held) -> bool:
        """Wait for one import; False when nothing (more) is worth waiting for."""
        first = self._num_cached(held.hashes)
        num_known = len(held.request.prompt_token_ids) + len(held.request.output_token_ids)
        held.num_tokens = num_known - first * self._limits.block_size
        if first == len(held.hashes):
            return False
        running = self._imports.get(held.hashes[first])
        if running is not None:
            num_coming = sum(h in self._imports for h in held.hashes[first:])
            await self._wait_for(running, self._wait_s(num_coming))
            return True
        plan = self._plan(held, first)
        if plan is None:
            return False
        held.tried.add(plan.peer.worker_id if plan.peer is not None else None)
        running = self._begin(held.hashes[: plan.end], first, plan)
        await self._wait_for(running, plan.timeout_s)
        return True

    async def _wait_for(self, running: _Import, timeout_s: float) -> None:
        assert running.task is not None
        running.num_waiting += 1
        try:
            await asyncio.wait([running.task], timeout=timeout_s)
        finally:
            running.num_waiting -= 1
            if not running.num_waiting:
                running.work.stop()

    def _plan(self, held: _Held, first: int) -> _Plan | None:
        """What to import next, None when computing is the best there is."""
        if self._num_imports() >= MAX_IMPORTS:
            return None
        missing = held.hashes[first:]
        if self._tiers is not None and None not in held.tried:
            num_blocks = self._tiers.restorable(missing)
            if num_blocks and self._pays(num_blocks, None):
                return _Plan(first + num_blocks, None, self._wait_s(num_blocks))
        peer = held.request.kv_source
        if self._reads is None or peer is None or peer.worker_id in held.tried:
            return None
        if peer.worker_id == self._myself.worker_id or self._is_known_to_fail(peer):
            return None
        if not self._pays(len(missing), peer.worker_id):
            return None
        return _Plan(len(held.hashes), peer, self._wait_s(len(missing)))

    def _begin(self, hashes: Sequence[BlockHash], first: int, plan: _Plan) -> _Import:
        number = next(self._numbers)
        name = RequestId(f"import/{self._myself.worker_id}/{self._myself.epoch}/{number}")
        running = _Import(KvImport(name, hashes, self._engine), tuple(hashes[first:]))
        for block_hash in running.hashes:
            self._imports.setdefault(block_hash, running)
        running.task = self._spawn(self._run(running, plan))
        return running

    async def _run(self, running: _Import, plan: _Plan) -> None:
        num_valid = 0
        try:
            if plan.peer is None:
                assert self._tiers is not None
                num_valid = await running.work.restore(self._tiers)
                num_bytes = running.work.num_moved * self._limits.block_bytes
                self._restored.count(num_bytes, running.work.moving_s)
            else:
                assert self._reads is not None
                num_valid = await running.work.fetch(
                    self._reads, plan.peer, timeout_s=plan.timeout_s
                )
        except Exception:
            # A defect; whoever waits computes.
            logger.exception("import %s failed", running.work.import_id)
        finally:
            for block_hash in running.hashes:
                if self._imports.get(block_hash) is running:
                    del self._imports[block_hash]
        # Ahead of the engine's news, which come with its next step.
        self._cached.update(running.work.hashes[:num_valid])

    def _is_known_to_fail(self, peer: PeerRef) -> bool:
        """No link could be made to this start of the peer, last time it was tried."""
        link = self._link(peer.worker_id)
        return link is not None and link.peer_epoch == peer.epoch and not link.transport

    def _pays(self, num_blocks: int, peer: WorkerId | None) -> bool:
        """Is it cheaper to move these blocks, from the tiers or a peer, than to compute them?"""
        link = self._link(peer) if peer is not None else None
        if peer is None:
            bytes_per_second = self._restored.per_second
        else:
            bytes_per_second = link.bytes_per_second if link is not None else None
        return fetch_pays(
            num_tokens=num_blocks * self._limits.block_size,
            num_bytes=num_blocks * self._limits.block_bytes,
            seconds_per_token=self._rate.seconds_per_token,
            bytes_per_second=bytes_per_second,
            latency_s=link.latency_s if link is not None else None,
        )

    def _wait_s(self, num_blocks: int) -> float:
        """How long a request may wait for blocks it could compute."""
        limits = self._limits
        seconds_per_token = self._rate.seconds_per_token or DEFAULT_SECONDS_PER_TOKEN
        computing_s = num_blocks * limits.block_size * seconds_per_token
        return min(limits.max_wait_s, max(MIN_WAIT_S, limits.max_wait_share * computing_s))

    def _num_cached(self, hashes: Sequence[BlockHash]) -> int:
        """Leading blocks of a chain that the pool caches."""
        return next((i for i, h in enumerate(hashes) if h not in self._cached), len(hashes))

    def _num_imports(self) -> int:
        return len({id(running) for running in self._imports.values()})

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task
