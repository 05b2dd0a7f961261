"""TLS of the front doors: certificates for HTTP and gRPC, and the log of clients refused.

Files are looked at before every handshake, so a certificate is renewed by replacing them; running
connections keep theirs. Clients speak TLS 1.2 or newer.

HTTP handshakes run through Python, so a refusal has its reason here. Those of gRPC run in its core,
which tells nobody: connections that never made a call are counted instead (`HandshakeWatch`).

Does not know: requests, API keys, `router.tls` towards the workers.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import grpc

from baton.core.errors import ConfigError
from baton.core.followed_files import FollowedFiles
from baton.core.metrics import REFUSED_HANDSHAKES
from baton.core.tls import (
    ExpiryWarning,
    load_ca,
    load_pair,
    read_file,
    shake_hands,
    warn_of_open_key,
)
from baton.rpc.tls import CallCheck, HandshakeWatch
from baton.telemetry.metrics import Metrics
from services.router.edge.door_tls_config import DoorTlsConfig

logger = logging.getLogger(__name__)

SECTION = "edge.tls"
WARNING_PERIOD_S = 60.0
HTTP_PROTOCOLS = ["http/1.1"]


class Refusal(Enum):
    """Why a handshake came to nothing. The texts are for the log."""

    EXPIRED = "the client's certificate has expired or is not valid yet"
    FOREIGN = "the client's certificate is not of a CA in edge.tls.client_ca_file"
    MISSING = "the client showed no certificate, and edge.tls.client_ca_file asks for one"
    PLAIN_TEXT = "the client spoke plain text; it must dial https"
    BY_CLIENT = "the client did not accept our certificate"
    OTHER = "the handshake failed"
    NO_CALL = "the connection to the gRPC door never made a call"

    @property
    def label(self) -> str:
        return self.name.lower()


OnRefused = Callable[[Refusal], None]


@dataclass(frozen=True, slots=True)
class DoorMaterial:
    """What one state of the files holds; checked to work."""

    cert: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext
    """Of a server."""
    expires_at_s: float
    """Unix time at which the certificate ends."""


class DoorTls:
    """Of one router process. Any thread may call."""

    def __init__(self, config: DoorTlsConfig, *, on_refused: OnRefused) -> None:
        """Read and check the files. Raises ConfigError naming the file and what to do."""
        paths = (config.cert_file, config.key_file, config.client_ca_file)
        self._config = config
        self._on_refused = on_refused
        self._log = RefusalLog(on_refused)
        self._files = FollowedFiles(
            [path for path in paths if path is not None],
            lambda: load_door_material(config),
            what="certificates of the front doors",
        )
        self._expiry = ExpiryWarning(config.cert_file)
        self.current()

    def current(self) -> DoorMaterial:
        """What the files hold now, or held when they last worked."""
        material = self._files.current()
        self._expiry.look(material.expires_at_s)
        return material

    def http_context(self) -> ssl.SSLContext:
        """For one server; each handshake takes the certificates of its time."""
        outer = _server_context(self._config)
        outer.sslobject_class = _watched(self._log)

        def renew(ends: ssl.SSLObject, host: str | None, context: ssl.SSLContext) -> None:
            # Called in every handshake, whether the client names a host or not.
            ends.context = self.current().context

        outer.sni_callback = renew
        return outer

    def grpc(self) -> GrpcDoorTls:
        return GrpcDoorTls(self, self._on_refused)


def open_door_tls(config: DoorTlsConfig, metrics: Metrics) -> DoorTls | None:
    """None where the front doors speak plain text. Raises ConfigError."""
    if not config.is_on:
        return None
    return DoorTls(config, on_refused=lambda why: metrics.add(REFUSED_HANDSHAKES, 1, why.label))


class GrpcDoorTls:
    """As `rpc.channel.ServerSide`, of one gRPC server."""

    def __init__(self, door: DoorTls, on_refused: OnRefused) -> None:
        self._door = door
        self._material = door.current()
        self._watch = HandshakeWatch(on_failed=lambda: on_refused(Refusal.NO_CALL))
        self._asks_clients = self._material.client_ca is not None
        # Without client certificates hardly a handshake fails, and calls need not be followed.
        self.interceptors: tuple[grpc.aio.ServerInterceptor, ...] = (
            (CallCheck(None, self._watch),) if self._asks_clients else ()
        )

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            _grpc_configuration(self._material),
            self._on_handshake,
            require_client_authentication=self._asks_clients,
        )

    def _on_handshake(self) -> grpc.ServerCertificateConfiguration | None:
        """On a thread of gRPC; None keeps what is in use."""
        if self._asks_clients:
            self._watch.connection_accepted()
        material = self._door.current()
        if material is self._material:
            return None
        self._material = material
        return _grpc_configuration(material)


class RefusalLog:
    """Counts handshakes that failed; logs the first of each kind, and then one a minute."""

    def __init__(self, on_refused: OnRefused, now: Callable[[], float] = time.monotonic) -> None:
        self._on_refused = on_refused
        self._now = now
        self._counts: dict[Refusal, int] = {}
        self._logged_at_s: dict[Refusal, float] = {}

    def failed(self, error: ssl.SSLError) -> None:
        refusal = why_refused(error)
        self._on_refused(refusal)
        self._counts[refusal] = self._counts.get(refusal, 0) + 1
        now_s = self._now()
        if now_s - self._logged_at_s.get(refusal, -WARNING_PERIOD_S) < WARNING_PERIOD_S:
            return
        self._logged_at_s[refusal] = now_s
        logger.warning(
            "a client was refused in the TLS handshake, %d so far for this reason: %s (%s)",
            self._counts[refusal],
            refusal.value,
            error.reason or error,
        )


def why_refused(error: ssl.SSLError) -> Refusal:
    """What a failed handshake of a server means."""
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        # 9: not valid yet; 10: expired. All others: no way to a CA that is trusted here.
        return Refusal.EXPIRED if error.verify_code in (9, 10) else Refusal.FOREIGN
    if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
        return Refusal.MISSING
    if reason in ("HTTP_REQUEST", "HTTPS_PROXY_REQUEST"):
        return Refusal.PLAIN_TEXT
    if "ALERT" in reason and ("CERTIFICATE" in reason or "CA" in reason.split("_")):
        return Refusal.BY_CLIENT
    return Refusal.OTHER


def refuse_client_ca(config: DoorTlsConfig) -> None:
    """Raises ConfigError where Ray Serve's own HTTP server could not do what is asked of it."""
    if config.client_ca_file is not None:
        raise ConfigError(
            f"{SECTION}.client_ca_file is set, and the HTTP door of Ray Serve does not ask clients "
            "for certificates; take --no-ray (runtime: kubernetes), or a gateway that does"
        )


def load_door_material(config: DoorTlsConfig) -> DoorMaterial:
    """Raises ConfigError for files that are missing, unreadable or do not belong together, and for
    a certificate that has ended."""
    assert config.cert_file is not None and config.key_file is not None
    cert = read_file(f"{SECTION}.cert_file", config.cert_file)
    key = read_file(f"{SECTION}.key_file", config.key_file)
    warn_of_open_key(f"{SECTION}.key_file", config.key_file)
    client_ca = None
    if config.client_ca_file is not None:
        client_ca = read_file(f"{SECTION}.client_ca_file", config.client_ca_file)
    context = _server_context(config)
    if client_ca is not None:
        load_ca(context, client_ca, config.client_ca_file, setting=f"{SECTION}.client_ca_file")
    load_pair(context, config.cert_file, config.key_file, section=SECTION)
    return DoorMaterial(cert, key, client_ca, context, _expiry(config, cert))


def _expiry(config: DoorTlsConfig, cert: bytes) -> float:
    """When the certificate ends, by a handshake with a client that trusts it. Raises
    ConfigError."""
    assert config.cert_file is not None and config.key_file is not None
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_pair(server, config.cert_file, config.key_file, section=SECTION)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    # The certificate itself is the anchor: who signed it is the clients' business.
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    load_ca(client, cert, config.cert_file, setting=f"{SECTION}.cert_file")
    try:
        return shake_hands(server, client, None)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"{SECTION}.cert_file {config.cert_file} would be refused by clients: "
            f"{error.verify_message}; issue a new one"
        ) from None
    except ssl.SSLError as error:
        raise ConfigError(
            f"{SECTION}.cert_file {config.cert_file} does not work: {error}"
        ) from None


def _server_context(config: DoorTlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(HTTP_PROTOCOLS)
    if config.client_ca_file is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _watched(log: RefusalLog) -> type[ssl.SSLObject]:
    """Servers of asyncio say nothing of handshakes that fail."""

    class Watched(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                log.failed(error)
                raise

    return Watched


def _grpc_configuration(material: DoorMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.cert)], root_certificates=material.client_ca
    )
