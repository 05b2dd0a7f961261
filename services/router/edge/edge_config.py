"""Settings of the router's HTTP and gRPC edges."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from baton.core.errors import ConfigError
from baton.settings import check_positive
from services.router.edge.door_tls_config import DoorTlsConfig
from services.router.edge.responses_config import ResponsesConfig


class ToolParserChoice(Enum):
    """`auto`, or a family of models."""

    AUTO = "auto"
    HERMES = "hermes"
    QWEN_XML = "qwen_xml"
    LLAMA3_JSON = "llama3_json"
    MISTRAL = "mistral"
    PYTHONIC = "pythonic"
    DEEPSEEK = "deepseek"


@dataclass(frozen=True, slots=True)
class EdgeConfig:
    """What one client request may cost before the dispatcher sees it."""

    max_body_bytes: int = 16 << 20
    """Longer HTTP bodies and gRPC messages are refused unread. A context of 128k tokens is well
    below 1 MiB of text."""
    max_head_bytes: int = 64 << 10
    """Longer heads of HTTP requests (request line and headers) are refused, and longer trailers.
    Keys, cookies and trace context of a gateway take a few KiB."""
    head_timeout_s: float = 20.0
    """From a connection, or a request's first byte, to the end of its head."""
    body_timeout_s: float = 60.0
    """From the request's head to the end of its body."""
    deadline_s: float = 600.0
    """From arrival until the client gets an error; a gRPC client's shorter deadline wins."""
    keep_alive_s: int = 75
    """Idle time of an HTTP connection; above the 60 s of common load balancers."""
    stalled_client_s: float = 120.0
    """A connection whose client neither reads nor answers for this long is cut."""
    stop_grace_s: float = 2.0
    """At a stop, how long open streams may go on before they get an error."""
    tool_parser: ToolParserChoice = ToolParserChoice.AUTO
    """How the model writes tool calls; `auto` goes by its chat template."""
    responses: ResponsesConfig = field(default_factory=ResponsesConfig)
    tls: DoorTlsConfig = field(default_factory=DoorTlsConfig)

    def __post_init__(self) -> None:
        check_positive(
            "edge", self, "max_body_bytes", "max_head_bytes", "head_timeout_s", "body_timeout_s",
            "deadline_s", "keep_alive_s", "stalled_client_s",
        )  # fmt: skip
        if self.stop_grace_s < 0:
            raise ConfigError(f"edge.stop_grace_s must not be negative, got {self.stop_grace_s}")
