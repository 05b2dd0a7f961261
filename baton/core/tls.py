"""Certificates of this process: settings, files, and what they are good for.

All processes of a deployment hold a certificate of the deployment's own CA that names the
deployment (a DNS name, not the address of a host: workers move). Both ends of a connection show
theirs and check the other's. Files are read again when they have changed, so certificates are
renewed by replacing files.

Not known here: gRPC, sockets, who is allowed what beyond "a process of this deployment".
"""

from __future__ import annotations

import contextlib
import logging
import re
import ssl
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.core.errors import ConfigError
from baton.core.followed_files import FollowedFiles

logger = logging.getLogger(__name__)

DEPLOYMENT_NAME = "baton"
EXPIRY_WARNING_S = 14 * 86400.0
EXPIRY_WARNING_PERIOD_S = 86400.0
MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_HANDSHAKE_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """TLS between the router and the workers, in both directions; all three files or none."""

    ca_file: Path | None = None
    """PEM certificates of the deployment's CA. Whoever it signs for is a process of the
    deployment."""
    cert_file: Path | None = None
    """PEM certificate of this process, with the chain up to the CA; for servers and clients."""
    key_file: Path | None = None
    """PEM key of the certificate, not encrypted."""
    name: str = DEPLOYMENT_NAME
    """The DNS name that certificates of the deployment carry, whatever host they are used on."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"tls.name {self.name!r} is no DNS name of lower-case letters, digits, - and ."
            )
        missing = [name for name, path in self.files() if path is None]
        if 0 < len(missing) < 3:
            raise ConfigError(
                f"tls.{missing[0]} is not set; TLS takes ca_file, cert_file and key_file, "
                "or none of them"
            )

    @property
    def is_on(self) -> bool:
        return self.ca_file is not None

    def files(self) -> tuple[tuple[str, Path | None], ...]:
        """The settings that name files, each with its value."""
        return (
            ("ca_file", self.ca_file),
            ("cert_file", self.cert_file),
            ("key_file", self.key_file),
        )


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """What one state of the files holds; checked to work with itself."""

    ca: bytes
    cert: bytes
    key: bytes
    server_context: ssl.SSLContext
    """TLS 1.3, asks for the client's certificate. Its name is checked by `names_deployment`."""
    client_context: ssl.SSLContext
    """TLS 1.3, shows our certificate; to be used with server_hostname = `TlsConfig.name`."""
    expires_at_s: float
    """Unix time at which our certificate ends."""


class TlsFiles:
    """The files of one process. Any thread may call."""

    def __init__(self, config: TlsConfig) -> None:
        """Read and check the files. Raises ConfigError naming the file and what to do."""
        if not config.is_on:
            raise ConfigError("tls.ca_file, tls.cert_file and tls.key_file are not set")
        self.config = config
        paths = [path for _, path in config.files() if path is not None]
        self._files = FollowedFiles(paths, lambda: load_material(config), what="certificates")
        self._expiry = ExpiryWarning(config.cert_file)
        self.current()

    @property
    def name(self) -> str:
        return self.config.name

    def current(self) -> TlsMaterial:
        """What the files hold now. Files that do not work are logged once and the last ones that
        did stay in use, since they may be half replaced."""
        material = self._files.current()
        self._expiry.look(material.expires_at_s)
        return material


class ExpiryWarning:
    """Says once a day that a certificate ends soon, or has ended."""

    def __init__(self, cert_file: Path | None) -> None:
        self._cert_file = cert_file
        self._told: tuple[float, float] = (0.0, 0.0)
        """When, and of which end."""

    def look(self, expires_at_s: float) -> None:
        """`expires_at_s`: Unix time. Two threads at once may both say it."""
        now_s = time.time()
        left_s = expires_at_s - now_s
        told_at_s, told_of_s = self._told
        is_told = told_of_s == expires_at_s and now_s - told_at_s < EXPIRY_WARNING_PERIOD_S
        if left_s > EXPIRY_WARNING_S or is_told:
            return
        self._told = (now_s, expires_at_s)
        what = "has expired" if left_s <= 0 else f"expires in {left_s / 86400:.1f} days"
        logger.warning(
            "the certificate in %s %s; replace the files, they are read again by themselves",
            self._cert_file,
            what,
        )


def open_tls(config: TlsConfig) -> TlsFiles | None:
    """The files of `config`, None where TLS is off. Raises ConfigError."""
    return TlsFiles(config) if config.is_on else None


def load_material(config: TlsConfig) -> TlsMaterial:
    """Read the files and let them shake hands with themselves.

    Raises ConfigError for files that are missing, unreadable or do not belong together, and for a
    certificate that peers would refuse: expired, of another CA, without the deployment's name.
    """
    ca, cert, key = (
        read_file(f"tls.{name}", path) for name, path in config.files() if path is not None
    )
    assert config.key_file is not None
    warn_of_open_key("tls.key_file", config.key_file)
    server_context = _context(config, ssl.PROTOCOL_TLS_SERVER, ca)
    client_context = _context(config, ssl.PROTOCOL_TLS_CLIENT, ca)
    try:
        expires_at_s = shake_hands(server_context, client_context, config.name)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"tls.cert_file {config.cert_file} would be refused by peers: "
            f"{verification_reason(error, config.name)}"
        ) from None
    except ssl.SSLError as error:
        raise ConfigError(f"tls.cert_file {config.cert_file} does not work: {error}") from None
    return TlsMaterial(ca, cert, key, server_context, client_context, expires_at_s)


def names_deployment(certificate: Mapping[str, Any] | None, name: str) -> bool:
    """Whether a verified peer certificate, as `getpeercert()` tells it, carries `name`.

    A server's TLS library checks whose CA signed a client's certificate, but not its names.
    """
    alternatives = (certificate or {}).get("subjectAltName", ())
    return ("DNS", name) in alternatives


def verification_reason(error: ssl.SSLCertVerificationError, name: str) -> str:
    """Why a certificate was refused and what to do, in one line."""
    match error.verify_code:
        case 10:
            return "it has expired; issue a new one"
        case 9:
            return "it is not valid yet; check the clocks of both hosts"
        case 18 | 19 | 20 | 21:
            return "it is not of the CA in tls.ca_file; give all processes the same CA"
        case 62:
            return f"it does not carry the DNS name {name!r}; give all processes the same tls.name"
        case _:
            return error.verify_message


def _context(config: TlsConfig, protocol: ssl._SSLMethod, ca: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    load_ca(context, ca, config.ca_file, setting="tls.ca_file")
    assert config.cert_file is not None and config.key_file is not None
    load_pair(context, config.cert_file, config.key_file, section="tls")
    return context


def load_pair(context: ssl.SSLContext, cert_file: Path, key_file: Path, *, section: str) -> None:
    """Show the certificate under `context`. Raises ConfigError naming the settings of `section`."""
    is_encrypted = False

    def no_password() -> str:
        nonlocal is_encrypted
        is_encrypted = True
        return ""

    try:
        context.load_cert_chain(cert_file, key_file, password=no_password)
    except (ssl.SSLError, OSError) as error:
        if is_encrypted:
            raise ConfigError(
                f"{section}.key_file {key_file} is encrypted; give an unencrypted key "
                "that only this user can read"
            ) from None
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"{section}.key_file {key_file} is not the key of {section}.cert_file {cert_file}; "
                "give the pair that was issued together"
            ) from None
        raise ConfigError(
            f"{section}.cert_file {cert_file} and {section}.key_file {key_file} hold no "
            "certificate and key in PEM form"
        ) from None


def load_ca(context: ssl.SSLContext, ca: bytes, ca_file: Path | None, *, setting: str) -> None:
    """Trust the certificates in `ca`. Raises ConfigError naming `setting`."""
    try:
        context.load_verify_locations(cadata=ca.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"{setting} {ca_file} holds no certificate in PEM form") from None


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None) -> float:
    """A handshake in memory; returns when the certificate ends. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(_HANDSHAKE_ROUNDS):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    certificate = ends[0].getpeercert()
    assert certificate is not None
    return float(ssl.cert_time_to_seconds(str(certificate["notAfter"])))


def read_file(setting: str, path: Path) -> bytes:
    """Raises ConfigError naming the setting `setting`."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{setting} {path} has more than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"{setting} {path} does not exist; `baton certs DIR` makes certificates"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{setting} {path} cannot be read ({error.strerror}); "
            "make it readable for the user of this process"
        ) from None


def warn_of_open_key(setting: str, path: Path) -> None:
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & stat.S_IROTH:
            logger.warning("%s %s has mode %04o; every user can read it", setting, path, mode)
