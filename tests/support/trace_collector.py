"""A collector of traces that speaks OTLP over gRPC and HTTP on the loopback, as a real one does."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

WAIT_S = 20.0


@dataclass(frozen=True)
class ReceivedSpan:
    """A span with what its resource says."""

    span: trace_pb2.Span
    service: str
    instance: str

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def trace_id(self) -> str:
        return self.span.trace_id.hex()

    @property
    def attributes(self) -> dict[str, object]:
        return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in self.span.attributes}


@dataclass
class TraceCollector:
    endpoint: str = ""
    num_exports: int = 0
    is_refusing: bool = False
    spans: list[ReceivedSpan] = field(default_factory=list)

    def take(self, request: pb.ExportTraceServiceRequest) -> None:
        self.num_exports += 1
        for resource_spans in request.resource_spans:
            resource = {a.key: a.value.string_value for a in resource_spans.resource.attributes}
            for scope_spans in resource_spans.scope_spans:
                self.spans += [
                    ReceivedSpan(s, resource["service.name"], resource["service.instance.id"])
                    for s in scope_spans.spans
                ]

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        return [s for s in self.spans if s.trace_id == trace_id]

    def wait_for(self, is_there: Callable[[TraceCollector], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not is_there(self):
            assert time.monotonic() < deadline, [s.name for s in self.spans]
            time.sleep(0.05)


class _GrpcService(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, collector: TraceCollector) -> None:
        self._collector = collector

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        if self._collector.is_refusing:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused")
        self._collector.take(request)
        return pb.ExportTraceServiceResponse()


@contextmanager
def grpc_collector() -> Iterator[TraceCollector]:
    collector = TraceCollector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_GrpcService(collector), server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait(5)


@contextmanager
def http_collector() -> Iterator[TraceCollector]:
    collector = TraceCollector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            is_right = self.path == "/v1/traces" and not collector.is_refusing
            if is_right:
                collector.take(pb.ExportTraceServiceRequest.FromString(body))
            self.send_response(200 if is_right else 400)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    collector.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()
