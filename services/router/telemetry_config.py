"""Settings: what a router shows of itself and its requests."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from urllib.parse import urlsplit

from baton.core.errors import ConfigError
from baton.settings import check_positive


class OtlpProtocol(Enum):
    GRPC = "grpc"
    HTTP = "http"


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """/metrics."""

    vllm_names: bool = True
    """Show series a second time under the names that vLLM gives them, for boards, autoscalers and
    endpoint pickers made for it."""


@dataclass(frozen=True, slots=True)
class TracingConfig:
    """Spans of requests, for a collector that speaks OTLP. Off by default."""

    otlp_endpoint: str | None = None
    """URL of the collector, e.g. http://collector:4317; https:// encrypts. None: no tracing.
    Needs the extra `tracing`. Headers and certificates for it come from the exporter's own
    OTEL_EXPORTER_OTLP_HEADERS and OTEL_EXPORTER_OTLP_CERTIFICATE."""
    protocol: OtlpProtocol = OtlpProtocol.GRPC
    """With http, /v1/traces is added to the endpoint unless it has a path."""
    sample_ratio: float = 1.0
    """Share of requests that are traced, of those whose client has not decided: a traceparent says
    whether its trace is sampled, and is obeyed."""
    max_pending_spans: int = 8192
    """Spans waiting for the collector; more are dropped and counted."""
    timeout_s: float = 10.0
    """Until the collector must have taken a batch, tries again included."""

    def __post_init__(self) -> None:
        check_positive("tracing", self, "max_pending_spans", "timeout_s")
        if not 0 <= self.sample_ratio <= 1:
            raise ConfigError(
                f"tracing.sample_ratio must be between 0 and 1, got {self.sample_ratio:g}"
            )
        if self.otlp_endpoint is None:
            return
        if "@" in self.otlp_endpoint:
            raise ConfigError(
                "tracing.otlp_endpoint holds a user or password, which settings and logs would "
                "show; give them by OTEL_EXPORTER_OTLP_HEADERS"
            )
        try:
            url = urlsplit(self.otlp_endpoint)
            is_valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ConfigError(
                "tracing.otlp_endpoint must be a URL such as http://collector:4317, "
                f"got {self.otlp_endpoint[:200]!r}"
            )
