"""Certificates for tests: good ones, of another CA, of another name, expired."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from unittest import mock

from baton.cli import certificate_authority
from baton.cli.certificate_authority import CertificateAuthority
from baton.cli.certs import tls_config, write_certificates
from baton.core.tls import TlsFiles


def make_certificates(folder: Path, name: str = "baton") -> Path:
    write_certificates(folder, name, days=30)
    return folder


def reissue(folder: Path, role: str, name: str = "baton", *, shift_days: float = 0) -> None:
    """A certificate of the folder's CA for one day, that begins in `shift_days`."""
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=shift_days)
    with mock.patch.object(certificate_authority, "_now", lambda: now):
        CertificateAuthority.load(folder).issue(role, name, days=1)


def tls_files(folder: Path, role: str = "worker", name: str = "baton") -> TlsFiles:
    return TlsFiles(tls_config(folder, role, name))


def unchecked_tls_files(
    folder: Path, role: str = "worker", name: str = "baton", *, expires_in_s: float = 86400.0
) -> TlsFiles:
    """Of files that this process would refuse for itself, as they are once they have expired."""
    with mock.patch("baton.core.tls.shake_hands", return_value=time.time() + expires_in_s):
        return tls_files(folder, role, name)
