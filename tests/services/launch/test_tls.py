"""A system takes TLS in all its processes or in none, and says so before it starts any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.cli.certs import write_certificates
from baton.core.config import merge
from baton.core.errors import ConfigError
from services.launch.config import SystemConfig
from services.launch.tls import check_tls, tls_values


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls") / "certificates"
    write_certificates(folder)
    return folder


def system(values: dict[str, Any], **changes: Any) -> SystemConfig:
    return SystemConfig(model_path=Path("/models/llama"), **merge(values, changes))


def test_folder_sets_all_sections(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(certificates.parent)
    values = tls_values(Path(certificates.name))
    check_tls(system(values))
    files = [values[section]["tls"]["cert_file"] for section in ("router", "prefill", "decode")]
    assert files == [str(certificates / f"{r}.pem") for r in ("router", "worker", "worker")]
    assert tls_values(None) == {}


def test_plain_system_needs_nothing() -> None:
    check_tls(system({}))


def test_section_without_tls_is_named(certificates: Path) -> None:
    values = tls_values(certificates)
    for section in ("router", "prefill", "decode"):
        others = {name: part for name, part in values.items() if name != section}
        with pytest.raises(ConfigError, match=f"{section}.tls none; router, prefill and decode"):
            check_tls(system(others))


def test_missing_prefill_pool_needs_no_certificates(certificates: Path) -> None:
    values = tls_values(certificates)
    del values["prefill"]
    check_tls(system(values, num_prefill=0))


def test_sections_agree_on_the_name(certificates: Path) -> None:
    values = merge(tls_values(certificates), {"decode": {"tls": {"name": "staging"}}})
    with pytest.raises(ConfigError, match=r"'staging' and router\.tls\.name 'baton'"):
        check_tls(system(values))


def test_files_that_do_not_work_are_named_with_their_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router: tls\.ca_file .* does not exist; `baton certs"):
        check_tls(system(tls_values(tmp_path)))
