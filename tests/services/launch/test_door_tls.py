"""TLS of the front doors of a whole system: checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import ConfigError
from certificates import make_certificates, reissue
from services.launch.config import SystemConfig, router_values
from services.launch.tls import check_door_tls


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_certificates(tmp_path / "doors", "localhost")


def system(tls: dict[str, Any], **values: Any) -> SystemConfig:
    return SystemConfig(model_path=Path("/models/llama"), router={"edge": {"tls": tls}}, **values)


def files(folder: Path, role: str = "router") -> dict[str, str]:
    return {"cert_file": f"{folder}/{role}.pem", "key_file": f"{folder}/{role}-key.pem"}


def test_wrong_certificates_are_named_before_anything_starts(folder: Path) -> None:
    check_door_tls(system({}), use_ray=True)
    check_door_tls(system(files(folder)), use_ray=True)
    reissue(folder, "old", "localhost", shift_days=-3)
    with pytest.raises(ConfigError, match=r"edge.tls.cert_file .*old.pem .* has expired"):
        check_door_tls(system(files(folder, "old")), use_ray=False)
    with pytest.raises(ConfigError, match=r"router.edge.tls.cert_fil"):
        check_door_tls(system({"cert_fil": "x"}), use_ray=False)


def test_what_ray_serve_would_not_enforce_is_refused(folder: Path) -> None:
    asks = system({**files(folder), "client_ca_file": f"{folder}/ca.pem"})
    check_door_tls(asks, use_ray=False)
    with pytest.raises(ConfigError, match=r"client_ca_file is set, and the HTTP door of Ray Serve"):
        check_door_tls(asks, use_ray=True)


def test_probes_get_a_port_of_their_own_beside_tls(folder: Path) -> None:
    assert "own_port" not in router_values(system({}))["copy"]
    copy = router_values(system(files(folder)), targets_dir=Path("/run/targets"))["copy"]
    assert copy["own_port"] == 0 and copy["targets_dir"] == "/run/targets"
    assert copy["shares_ports"] is False and copy["name"] == "router"
    copy = router_values(system(files(folder), num_routers=2), index=1)["copy"]
    assert copy["shares_ports"] is True and copy["name"] == "router-1"
