"""Which requests are traced, and their spans on the way to a collector."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from baton.core import metrics as series
from baton.core.errors import ConfigError
from baton.core.trace import TraceContext
from baton.telemetry.metrics import Metrics
from baton.telemetry.spans import SpanCounts, SpanExporter, SpanQueue
from services.router.requests.request_record import RequestRecord
from services.router.requests.request_spans import spans_of
from services.router.telemetry_config import OtlpProtocol, TracingConfig

STOP_TIMEOUT_S = 3.0


class Tracer:
    """An `EndedSink`. Without a queue it traces nothing."""

    def __init__(
        self,
        queue: SpanQueue | None,
        metrics: Metrics,
        *,
        router_id: str,
        sample_ratio: float,
        rng: random.Random,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._queue = queue
        self._metrics = metrics
        self._router_id = router_id
        self._sample_ratio = sample_ratio
        self._rng = rng
        self._wall_clock = wall_clock
        self._counted = SpanCounts()

    def ended(self, record: RequestRecord) -> None:
        if self._queue is None:
            return
        parent = record.trace
        if parent is None:
            is_sampled = self._rng.random() < self._sample_ratio
            parent = TraceContext(self._rng.getrandbits(128) or 1, 0, is_sampled)
        if parent.is_sampled:
            now_s = self._wall_clock()
            self._queue.add(
                spans_of(record, parent, self._rng, router_id=self._router_id, now_s=now_s)
            )

    def update(self) -> None:
        """Bring the counters up to date."""
        if self._queue is None:
            return
        counts = self._queue.counts
        for result, now, before in zip(counts._fields, counts, self._counted, strict=True):
            self._metrics.add(series.TRACE_SPANS, now - before, result)
        self._counted = counts

    async def stop(self) -> None:
        """Send what is pending. Takes at most seconds."""
        if self._queue is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._queue.stop, STOP_TIMEOUT_S)
            self.update()


def open_tracer(config: TracingConfig, router_id: str, metrics: Metrics) -> Tracer:
    """Raises ConfigError when tracing is on and its packages are not installed."""
    exporter = open_exporter(config)
    queue = None if exporter is None else SpanQueue(exporter, max_pending=config.max_pending_spans)
    return Tracer(
        queue,
        metrics,
        router_id=router_id,
        sample_ratio=config.sample_ratio,
        rng=random.Random(),
    )


def open_exporter(config: TracingConfig) -> SpanExporter | None:
    """None where tracing is off. Raises ConfigError when its packages are not installed."""
    if config.otlp_endpoint is None:
        return None
    try:
        from baton.telemetry.otlp import OtlpExporter

        return OtlpExporter(
            config.otlp_endpoint,
            over_http=config.protocol is OtlpProtocol.HTTP,
            timeout_s=config.timeout_s,
        )
    except ImportError as error:
        raise ConfigError(
            f"tracing.otlp_endpoint is set and {error.name or error} is not installed; "
            "install this package with its extra `tracing`, or leave the setting out"
        ) from error
