"""Decode and prefill speed of an engine that is driven step by step, as its worker drives it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from baton.core.errors import InternalError
from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.engine.engine import Engine

SETTLE_STEPS = 8
"""Steps of the full batch before the clock starts."""
MAX_STEPS = 100_000


class TooFewRunning(Exception):
    """The batch that was to be measured does not fit into the KV pool."""


@dataclass(frozen=True, slots=True)
class DecodePoint:
    batch_size: int
    context: int
    step_s: float

    @property
    def key(self) -> tuple[int, int]:
        """As in `peers`."""
        return self.batch_size, self.context

    @property
    def tokens_per_s(self) -> float:
        return self.batch_size / self.step_s


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    num_prompts: int
    length: int
    total_s: float
    """From submission to the last prompt's first token."""

    @property
    def key(self) -> tuple[int, int]:
        """As in `peers`."""
        return self.num_prompts, self.length

    @property
    def tokens_per_s(self) -> float:
        return self.num_prompts * self.length / self.total_s


class EngineDriver:
    """Requests of random tokens, and the loop over `Engine.step`."""

    def __init__(self, engine: Engine, vocab_size: int, seed: int = 0) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._ids: Iterator[int] = count()

    def submit(self, num_prompts: int, length: int, max_tokens: int) -> set[RequestId]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        submitted = set()
        for _ in range(num_prompts):
            prompt = tuple(self._random.randrange(self._vocab_size) for _ in range(length))
            request_id = RequestId(f"bench-{next(self._ids)}")
            self._engine.submit(GenerateRequest(request_id, Work.GENERATE, prompt, sampling))
            submitted.add(request_id)
        return submitted

    def run_until_first_tokens(self, waiting: set[RequestId]) -> None:
        """Step until each of these has given a token."""
        waiting = set(waiting)
        for _ in range(MAX_STEPS):
            for delta in self._engine.step().deltas:
                if delta.error:
                    raise InternalError(delta.error)
                waiting.discard(delta.request_id)
            if not waiting:
                return
        raise InternalError(f"{len(waiting)} requests gave no token in {MAX_STEPS} steps")

    def finish(self, request_ids: set[RequestId]) -> None:
        """Cancel these and run the engine empty."""
        for request_id in request_ids:
            self._engine.cancel(request_id)
        while self._engine.has_work:
            self._engine.step()
        self._engine.check_integrity()

    def steps(self, num_steps: int) -> float:
        """Seconds of that many steps."""
        start = time.perf_counter()
        for _ in range(num_steps):
            self._engine.step()
        return time.perf_counter() - start

    def measure_decode(self, batch_size: int, context: int, num_steps: int) -> DecodePoint:
        """Step time while all of `batch_size` sequences decode, from `context` tokens on.

        Raises TooFewRunning when they do not all fit.
        """
        max_tokens = num_steps + 4 * SETTLE_STEPS + batch_size
        request_ids = self.submit(batch_size, context, max_tokens)
        self.run_until_first_tokens(request_ids)
        self.steps(SETTLE_STEPS)
        before = self._engine.load().num_running
        elapsed_s = self.steps(num_steps)
        after = self._engine.load().num_running
        self.finish(request_ids)
        if min(before, after) < batch_size:
            raise TooFewRunning(
                f"{min(before, after)} of {batch_size} sequences of {context} tokens ran together; "
                f"the KV pool holds {self._engine.load().total_blocks} blocks"
            )
        return DecodePoint(batch_size, context, elapsed_s / num_steps)

    def measure_prefill(self, num_prompts: int, length: int) -> PrefillPoint:
        """Time to all first tokens of prompts submitted together to an idle engine."""
        request_ids = self.submit(num_prompts, length, 2)
        start = time.perf_counter()
        self.run_until_first_tokens(request_ids)
        total_s = time.perf_counter() - start
        self.finish(request_ids)
        return PrefillPoint(num_prompts, length, total_s)
