"""Seconds of an engine's real steps: prompts, decode batches, and both in one step.

    a round   prompts of each length behind each cached prefix, alone
              a batch of each context: all of it decodes, a prompt joins, half of it ends, ...

Inputs are fresh random tokens, so that nothing is cached but what a measurement cached on purpose.
Rounds go through all measurements in another order each time: what disturbs the machine for a while
then touches all of them alike.

Does not know: what the figures are for, other workers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from baton.core.block import chain_hashes, root_hash
from baton.core.errors import InternalError
from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.engine.engine import Engine
from services.planner.profiling.points import GROWTH_TOKENS, BatchPoint, Point, PrefillPoint
from services.planner.profiling.samples import StepKind, StepSample

MAX_STEPS = 100_000
SETTLE_STEPS = 2
DECODE_STEPS = 8
ROOT = root_hash("profile")


class EngineProbe:
    """Drives one engine step by step, as its worker does."""

    def __init__(
        self,
        engine: Engine,
        *,
        vocab_size: int,
        block_size: int,
        max_num_seqs: int,
        seed: int = 0,
    ) -> None:
        self._engine = engine
        self._vocab_size, self._block_size = vocab_size, block_size
        self._max_num_seqs = max_num_seqs
        self._rng = random.Random(seed)
        self._ids: Iterator[int] = count()

    def round(
        self, points: Sequence[Point], *, on_point: Callable[[Point], None] = lambda _: None
    ) -> list[StepSample]:
        """All of `points` once, in a random order."""
        samples: list[StepSample] = []
        for point in self._rng.sample(list(points), len(points)):
            if isinstance(point, PrefillPoint):
                samples.append(self.prefill(point))
            else:
                samples += self.batches(point)
            on_point(point)
        return samples

    def prefill(self, point: PrefillPoint) -> StepSample:
        """One prompt behind a cached prefix, from its submission to its token."""
        prefix = self._tokens(point.num_cached_tokens)
        if prefix:
            self._until_first_tokens({self._submit(prefix, max_tokens=1)})
            self._run_empty()
        prompt = prefix + self._tokens(point.num_new_tokens)
        request_id = self._submit(prompt, max_tokens=1)
        num_steps, seconds = self._until_first_tokens({request_id})
        self._run_empty()
        new, context = point.num_new_tokens, point.num_cached_tokens
        return StepSample(
            point.name, StepKind.PREFILL, num_steps, new, new * (context + new / 2), 0, 0, seconds
        )

    def batches(self, point: BatchPoint) -> list[StepSample]:
        """Decode steps of each batch size, and a prompt's steps beside each."""
        running = [
            self._submit(self._tokens(point.num_context_tokens), max_tokens=GROWTH_TOKENS)
            for _ in range(point.batch_sizes[0])
        ]
        samples: list[StepSample] = []
        try:
            self._until_first_tokens(set(running))
            for size in point.batch_sizes:
                for request_id in running[size:]:
                    self._engine.cancel(request_id)
                running = running[:size]
                self._steps(SETTLE_STEPS)
                if self._engine.load().num_running < size:
                    # Memory was too small for the batch after all.
                    break
                samples.append(self._decode(point, size))
                if size < self._max_num_seqs:
                    samples.append(self._mixed(point, size))
        finally:
            for request_id in running:
                self._engine.cancel(request_id)
            self._run_empty()
        return samples

    def _decode(self, point: BatchPoint, size: int) -> StepSample:
        before = self._engine.load().resident_kv_tokens
        seconds = self._steps(DECODE_STEPS)
        kv_tokens = DECODE_STEPS * (before + DECODE_STEPS * size / 2)
        name = f"decode {size} x {point.num_context_tokens}"
        return StepSample(
            name, StepKind.DECODE, DECODE_STEPS, 0, 0, DECODE_STEPS * size, kv_tokens, seconds
        )

    def _mixed(self, point: BatchPoint, size: int) -> StepSample:
        new = point.num_joining_tokens
        before = self._engine.load().resident_kv_tokens
        request_id = self._submit(self._tokens(new), max_tokens=1)
        num_steps, seconds = self._until_first_tokens({request_id})
        self._steps(1)
        name = f"prefill {new} beside {size} x {point.num_context_tokens}"
        kv_tokens = num_steps * (before + num_steps * size / 2)
        return StepSample(
            name, StepKind.MIXED, num_steps, new, new * new / 2, num_steps * size, kv_tokens,
            seconds,
        )  # fmt: skip

    def _tokens(self, num: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(self._vocab_size) for _ in range(num))

    def _submit(self, prompt: tuple[int, ...], *, max_tokens: int) -> RequestId:
        request_id = RequestId(f"profile-{next(self._ids)}")
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        hashes = tuple(chain_hashes(ROOT, prompt, self._block_size))
        self._engine.submit(
            GenerateRequest(request_id, Work.GENERATE, prompt, sampling, block_hashes=hashes)
        )
        return request_id

    def _until_first_tokens(self, waiting: set[RequestId]) -> tuple[int, float]:
        """Steps and seconds until each of these has given a token. Raises InternalError."""
        waiting = set(waiting)
        start_s = time.perf_counter()
        for num_steps in range(1, MAX_STEPS):
            for delta in self._engine.step().deltas:
                if delta.error:
                    raise InternalError(delta.error)
                waiting.discard(delta.request_id)
            if not waiting:
                return num_steps, time.perf_counter() - start_s
        raise InternalError(f"{len(waiting)} requests gave no token in {MAX_STEPS} steps")

    def _steps(self, num: int) -> float:
        start_s = time.perf_counter()
        for _ in range(num):
            self._engine.step()
        return time.perf_counter() - start_s

    def _run_empty(self) -> None:
        while self._engine.has_work:
            self._engine.step()
