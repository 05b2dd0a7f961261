"""`baton certs DIR`: a small CA and certificates for a deployment's router and workers.

All certificates carry the deployment's name as a DNS name and serve both ends of a connection. A
deployment that has a CA of its own needs none of this.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path

from baton.core.errors import ConfigError
from baton.core.tls import DEPLOYMENT_NAME, TlsConfig, load_material

ROLES = ("router", "worker")
DAYS = 365
MAX_DAYS = 3650


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="made with mode 0700")
    parser.add_argument(
        "--name",
        default=DEPLOYMENT_NAME,
        help="DNS name of the deployment, as tls.name has it (default: %(default)s)",
    )
    parser.add_argument(
        "--days", type=int, default=DAYS, metavar="N", help="validity (default: %(default)s)"
    )
    parser.add_argument(
        "--renew",
        action="store_true",
        help="replace the certificates in DIR and keep their CA; running processes read them anew",
    )


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    folder: Path = args.directory
    write_certificates(folder, args.name, days=args.days, is_renewal=args.renew)
    ends = time.strftime("%Y-%m-%d", time.localtime(time.time() + args.days * 86400))
    print(
        f"{folder} holds ca.pem and certificates of router and workers, good until {ends}\n"
        f"  baton serve --tls-dir {folder}{_name_settings(args.name)}\n"
        "ca-key.pem lets new processes into the deployment: keep it where nothing is served"
    )
    return 0


def _name_settings(name: str) -> str:
    if name == DEPLOYMENT_NAME:
        return ""
    sections = ("router", "prefill", "decode")
    return "".join(f" --set {section}.tls.name={name}" for section in sections)


def write_certificates(
    folder: Path, name: str = DEPLOYMENT_NAME, *, days: int = DAYS, is_renewal: bool = False
) -> None:
    """Make certificates of all roles, and first the CA unless they are renewed.

    Raises ConfigError.
    """
    TlsConfig(name=name)
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(f"--days must be between 1 and {MAX_DAYS}, got {days}")
    has_ca = (folder / "ca.pem").exists()
    if has_ca and not is_renewal:
        raise ConfigError(
            f"{folder} holds certificates already; --renew replaces those of router and workers "
            "and keeps the CA"
        )
    if is_renewal and not has_ca:
        raise ConfigError(f"{folder} holds no ca.pem to renew with; leave out --renew")
    if importlib.util.find_spec("cryptography") is None:
        raise ConfigError(
            "making certificates needs the package cryptography: pip install 'baton[certs]'; "
            "certificates of another CA work as well"
        )
    from baton.cli.certificate_authority import CertificateAuthority

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = (
        CertificateAuthority.load(folder) if is_renewal else CertificateAuthority.make(folder, name)
    )
    for role in ROLES:
        authority.issue(role, name, days=days)
        load_material(tls_config(folder, role, name))


def tls_config(folder: Path, role: str, name: str = DEPLOYMENT_NAME) -> TlsConfig:
    """The settings of a process of `role` over a folder of ours."""
    return TlsConfig(
        ca_file=folder / "ca.pem",
        cert_file=folder / f"{role}.pem",
        key_file=folder / f"{role}-key.pem",
        name=name,
    )
