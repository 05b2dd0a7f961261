"""Settings of TLS at the router's front doors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from baton.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DoorTlsConfig:
    """TLS towards clients, of HTTP and gRPC alike. `router.tls` is another matter: that is towards
    the workers, with certificates of the deployment's own CA."""

    cert_file: Path | None = None
    """PEM certificate that names the host clients dial, with its chain. None: plain text."""
    key_file: Path | None = None
    """PEM key of the certificate, not encrypted."""
    client_ca_file: Path | None = None
    """PEM certificates of CAs. Only clients with a certificate of one of them get in; None lets
    everybody in, to be told apart by API keys."""

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            missing = "cert_file" if self.cert_file is None else "key_file"
            raise ConfigError(
                f"edge.tls.{missing} is not set; TLS at the front doors takes cert_file and "
                "key_file, or neither"
            )
        if self.client_ca_file is not None and self.cert_file is None:
            raise ConfigError(
                "edge.tls.client_ca_file asks clients for certificates, which takes TLS: set "
                "edge.tls.cert_file and key_file"
            )

    @property
    def is_on(self) -> bool:
        return self.cert_file is not None
