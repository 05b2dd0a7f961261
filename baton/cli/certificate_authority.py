"""A small CA in a folder, for deployments that have none: the one place that uses `cryptography`.

ca.pem       for every process      ca-key.pem      for whoever renews, nobody else
ROLE.pem     of one kind of process, with ROLE-key.pem
"""

from __future__ import annotations

import datetime
import os
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from baton.core.errors import ConfigError

CA_DAYS = 3660
CLOCK_SKEW = datetime.timedelta(minutes=5)
"""Clocks of other hosts may be behind; a certificate is valid from this long ago."""
MAX_COMMON_NAME_CHARS = 64
BOTH_ENDS = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


class CertificateAuthority:
    """The CA of one folder."""

    def __init__(
        self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> None:
        self._folder = folder
        self._certificate = certificate
        self._key = key

    @classmethod
    def make(cls, folder: Path, name: str) -> CertificateAuthority:
        """A new CA, written to `folder`."""
        key = ec.generate_private_key(ec.SECP256R1())
        # Distinct, so that a wrong CA shows as such in other programs' messages.
        subject = _subject(f"{name} CA {secrets.token_hex(4)}")
        builder = _builder(subject, subject, key, ends_at=_now() + datetime.timedelta(CA_DAYS))
        builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
        builder = builder.add_extension(_key_usage(is_ca=True), critical=True)
        certificate = _sign(builder, key)
        _write_key(folder / "ca-key.pem", key)
        _write(folder / "ca.pem", certificate.public_bytes(Encoding.PEM), mode=0o644)
        return cls(folder, certificate, key)

    @classmethod
    def load(cls, folder: Path) -> CertificateAuthority:
        """The CA that `make` wrote. Raises ConfigError."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
            key = load_pem_private_key((folder / "ca-key.pem").read_bytes(), password=None)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{error.filename} does not exist; renewing takes the CA's certificate and key"
            ) from None
        except (ValueError, TypeError):
            raise ConfigError(
                f"{folder} holds a ca.pem or ca-key.pem that is no unencrypted PEM file"
            ) from None
        is_pair = key.public_key() == certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_pair:
            raise ConfigError(f"{folder / 'ca-key.pem'} is not the key of ca.pem")
        return cls(folder, certificate, key)

    def issue(self, role: str, name: str, *, days: int) -> None:
        """Write a certificate for processes of `role` that names the deployment `name`.

        Raises ConfigError when it would outlive the CA.
        """
        ends_at = _now() + datetime.timedelta(days)
        ca_ends_at = self._certificate.not_valid_after_utc
        if ca_ends_at < ends_at:
            raise ConfigError(
                f"the CA ends {ca_ends_at:%Y-%m-%d}, before the {days} days asked for; take fewer "
                "days, or start over in an empty folder"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = self._certificate.subject
        builder = _builder(_subject(f"{name} {role}"), issuer, key, ends_at=ends_at)
        builder = builder.add_extension(x509.BasicConstraints(False, None), critical=True)
        builder = builder.add_extension(_key_usage(is_ca=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(BOTH_ENDS), critical=False)
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        certificate = _sign(builder.add_extension(names, critical=False), self._key)
        # A process that reads in between finds a pair that does not match and keeps its old one.
        _write_key(self._folder / f"{role}-key.pem", key)
        path = self._folder / f"{role}.pem"
        _write(path, certificate.public_bytes(Encoding.PEM), mode=0o644)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    *,
    ends_at: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - CLOCK_SKEW)
        .not_valid_after(ends_at)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _sign(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    return builder.add_extension(signer, critical=False).sign(key, hashes.SHA256())


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(common_name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, common_name[-MAX_COMMON_NAME_CHARS:])]
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _write(path, data, mode=0o600)


def _write(path: Path, data: bytes, *, mode: int) -> None:
    """Replace `path` at once: nobody sees half a file, or a key with another mode."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    draft.replace(path)
