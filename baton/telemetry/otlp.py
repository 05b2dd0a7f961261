"""Spans over OTLP, by OpenTelemetry's exporters (extra `tracing`).

Imported only where tracing is on. Each span carries the resource of the process that did the work,
so that a collector shows routers and workers as services of their own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter as SdkExporter
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

import baton
from baton.telemetry.spans import Span

LOG_PERIOD_S = 60.0
_HTTP_PATH = "/v1/traces"
_SCOPE = InstrumentationScope("baton", baton.__version__)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class _Seldom(logging.Filter):
    """Lets one line a minute pass: a collector that is away is news once."""

    def __init__(self) -> None:
        super().__init__()
        self._silent_until_s = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now_s = time.monotonic()
        if now_s < self._silent_until_s:
            return False
        self._silent_until_s = now_s + LOG_PERIOD_S
        return True


class OtlpExporter:
    """A `SpanExporter`."""

    def __init__(self, endpoint: str, *, over_http: bool, timeout_s: float) -> None:
        """Connects when there is something to send."""
        self._exporter = _sdk_exporter(endpoint, over_http=over_http, timeout_s=timeout_s)
        self._seldom = _Seldom()
        self._loggers = [
            logging.getLogger(cls.__module__)
            for cls in type(self._exporter).__mro__
            if cls.__module__.startswith("opentelemetry.exporter.")
        ]
        for logger in self._loggers:
            logger.addFilter(self._seldom)

    def export(self, spans: Sequence[Span]) -> bool:
        result = self._exporter.export([_readable(span) for span in spans])
        return result is SpanExportResult.SUCCESS

    def close(self) -> None:
        self._exporter.shutdown()
        for logger in self._loggers:
            logger.removeFilter(self._seldom)


def _sdk_exporter(endpoint: str, *, over_http: bool, timeout_s: float) -> SdkExporter:
    if over_http:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

        path = urlsplit(endpoint).path
        url = endpoint if path.strip("/") else endpoint.rstrip("/") + _HTTP_PATH
        return Http(endpoint=url, timeout=timeout_s)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

    return Grpc(endpoint=endpoint, timeout=timeout_s, insecure=endpoint.startswith("http://"))


def _readable(span: Span) -> ReadableSpan:
    state = TraceState.from_header([span.trace_state]) if span.trace_state else None
    context = SpanContext(span.trace_id, span.span_id, False, _SAMPLED, state)
    parent = None
    if span.parent_id:
        parent = SpanContext(span.trace_id, span.parent_id, span.is_server, _SAMPLED, state)
    status = Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET)
    return ReadableSpan(
        name=span.name,
        context=context,
        parent=parent,
        resource=_resource(span.service, span.instance),
        attributes=dict(span.attributes),
        kind=SpanKind.SERVER if span.is_server else SpanKind.INTERNAL,
        status=status,
        start_time=int(span.start_s * 1e9),
        end_time=int(span.end_s * 1e9),
        instrumentation_scope=_SCOPE,
    )


@lru_cache(maxsize=1024)
def _resource(service: str, instance: str) -> Resource:
    return Resource(
        {
            "service.name": service,
            "service.instance.id": instance,
            "service.version": baton.__version__,
        }
    )
