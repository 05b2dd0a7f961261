"""`baton certs`: what it writes works, and nothing is replaced by accident."""

from __future__ import annotations

import importlib.util
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.cli import certs
from baton.cli.certificate_authority import CertificateAuthority
from baton.cli.main import main
from baton.core.errors import ConfigError
from baton.core.tls import load_material
from certificates import tls_files

FILES = {"ca.pem", "ca-key.pem", "router.pem", "router-key.pem", "worker.pem", "worker-key.pem"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certs.write_certificates(tmp_path / "tls")
    return tmp_path / "tls"


def test_command_writes_certificates_that_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "tls"
    assert main(["certs", str(folder)], {}) == 0
    assert f"baton serve --tls-dir {folder}\n" in capsys.readouterr().out
    assert contents(folder).keys() == FILES
    for role in certs.ROLES:
        load_material(certs.tls_config(folder, role))


def test_keys_are_for_their_owner_only(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.glob("*-key.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_is_replaced_unless_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    assert main(["certs", str(folder)], {}) == 2
    assert "--renew replaces those of router and workers" in capsys.readouterr().err
    assert contents(folder) == before


def test_renewal_keeps_the_ca_and_is_read_by_a_running_process(folder: Path) -> None:
    before, files = contents(folder), tls_files(folder)
    old = files.current()
    assert main(["certs", str(folder), "--renew", "--days", "10"], {}) == 0
    after = contents(folder)
    assert {name for name in FILES if after[name] == before[name]} == {"ca.pem", "ca-key.pem"}
    assert files.current().cert == after["worker.pem"]
    assert files.current().expires_at_s < old.expires_at_s


def test_name_is_on_the_certificates_and_in_the_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"staging.{'x' * 60}.example"
    assert main(["certs", str(tmp_path / "tls"), "--name", name], {}) == 0
    assert f"--set decode.tls.name={name}" in capsys.readouterr().out
    load_material(certs.tls_config(tmp_path / "tls", "worker", name))
    with pytest.raises(ConfigError, match="does not carry the DNS name 'baton'"):
        load_material(certs.tls_config(tmp_path / "tls", "worker"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--days", "0"], "--days must be between 1 and 3650, got 0"),
        (["--days", "4000"], "--days must be between 1 and 3650, got 4000"),
        (["--name", "No Name"], "is no DNS name"),
        (["--renew"], "holds no ca.pem to renew with"),
    ],
)
def test_wrong_wishes_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["certs", str(tmp_path / "tls"), *arguments], {}) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tls").exists()


def test_longest_validity_fits_into_a_new_ca(tmp_path: Path) -> None:
    certs.write_certificates(tmp_path / "tls", days=certs.MAX_DAYS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "ca-key.pem").unlink(), r"ca-key\.pem does not exist"),
        (lambda f: (f / "ca-key.pem").write_text("x"), "no unencrypted PEM file"),
        (lambda f: (f / "ca.pem").write_text("x"), "no unencrypted PEM file"),
        (
            lambda f: (f / "ca-key.pem").write_bytes((f / "worker-key.pem").read_bytes()),
            r"is not the key of ca\.pem",
        ),
    ],
    ids=["no key", "bad key", "bad certificate", "other key"],
)
def test_ca_that_cannot_sign_is_named(
    folder: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        certs.write_certificates(folder, is_renewal=True)


def test_certificate_never_outlives_its_ca(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the CA ends"):
        CertificateAuthority.load(folder).issue("worker", "baton", days=4000)


def test_missing_library_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["certs", str(tmp_path / "tls")], {}) == 2
    assert "pip install 'baton[certs]'" in capsys.readouterr().err
    assert not (tmp_path / "tls").exists()
