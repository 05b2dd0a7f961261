"""Steps as CUDA graphs: one launch replays every kernel of a step.

A graph is captured for each of a few numbers of rows, a step is padded to the next one: decode
steps, and a prompt that is computed alone and so short that its kernels would take longer to launch
than to run. All graphs share one memory pool, so the largest, captured first, decides its size.
What a graph reads and writes lies at the addresses of its capture.

Not known here: what a step computes, what its inputs mean.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from baton.engine.gpu.device import ComputeDevice

PaddedStep = Callable[[int], Tensor]
"""Rows -> logits [sampled rows, vocabulary of this rank], computed from the rows' fixed inputs."""
Progress = Callable[[int, int], None]
"""Done, of how many."""


def decode_buckets(max_batch_size: int) -> list[int]:
    """Batch sizes that get a graph of their own, ascending; the last is `max_batch_size`.

    Above 64 a step is an eighth of the size or less, so padding wastes little.
    """
    if max_batch_size < 1:
        return []
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64]
    while sizes[-1] < max_batch_size:
        sizes.append(sizes[-1] + max(16, sizes[-1] // 128 * 16))
    return [*(size for size in sizes if size < max_batch_size), max_batch_size]


CHUNK_SIZES = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512)
"""An 8B model computes 512 tokens in 12 ms, for whose kernels a host takes 16 to 25 ms. Up to some
200 rows reading the weights takes the time, so padding costs little."""


def chunk_buckets(max_num_tokens: int) -> list[int]:
    """Tokens of a lone chunk that get a graph of their own, ascending, up to `max_num_tokens`."""
    largest = min(max_num_tokens, CHUNK_SIZES[-1])
    return [] if largest < 1 else [*(size for size in CHUNK_SIZES if size < largest), largest]


class PaddedSteps(Protocol):
    """Steps of fixed numbers of rows."""

    def bucket_for(self, num_rows: int) -> int | None:
        """The size that `num_rows` are padded to; None when they are too many."""
        ...

    def run(self, bucket: int, step: PaddedStep) -> Tensor:
        """Logits of a step whose inputs are in place; valid until the next step.

        `step` is the same each time; it is not kept, so that a rank and its graphs are freed with
        the last reference to the rank.
        """
        ...


class EagerSteps:
    """Padded steps without graphs."""

    def __init__(self, buckets: Sequence[int]) -> None:
        self._buckets = list(buckets)

    def bucket_for(self, num_rows: int) -> int | None:
        index = bisect_left(self._buckets, num_rows)
        return self._buckets[index] if index < len(self._buckets) else None

    def run(self, bucket: int, step: PaddedStep) -> Tensor:
        return step(bucket)


class GraphedSteps(EagerSteps):
    """Captured graphs; everything is compiled and captured before the first request."""

    def __init__(
        self,
        step: PaddedStep,
        buckets: Sequence[int],
        device: ComputeDevice,
        memory_pool: Any,
        on_progress: Progress,
    ) -> None:
        """`memory_pool`: torch's handle of the one that all graphs of a rank share."""
        super().__init__(buckets)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}
        with _no_collection():
            for done, bucket in enumerate(reversed(self._buckets)):
                on_progress(done, len(self._buckets))
                self._capture(bucket, step, memory_pool, device)
        on_progress(len(self._buckets), len(self._buckets))

    def run(self, bucket: int, step: PaddedStep) -> Tensor:
        self._graphs[bucket].replay()
        return self._logits[bucket]

    def _capture(
        self, bucket: int, step: PaddedStep, memory_pool: Any, device: ComputeDevice
    ) -> None:
        with device.stream():
            # Compiles what this size needs, which a capture must not.
            step(bucket)
            device.record().wait()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph,
                pool=memory_pool,
                stream=torch.cuda.current_stream(),
                capture_error_mode="thread_local",
            ):
                self._logits[bucket] = step(bucket)
        self._graphs[bucket] = graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collection during a capture could free device memory, which would end the capture."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
