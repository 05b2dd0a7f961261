"""`baton keys` on a file and on a real Redis."""

from __future__ import annotations

import pytest

from baton.cli.main import main
from services.router.shared.state import hash_key
from services.router.tenants.api_keys import read_keys
from tests.support.redis_server import RedisServer


@pytest.fixture(params=["file", "redis"])
def place(request, tmp_path):
    """Options that name a place for keys."""
    if request.param == "file":
        yield ["--file", str(tmp_path / "keys.json")]
        return
    server = RedisServer(tmp_path)
    server.start()
    yield ["--redis", server.url, "--deployment", "test"]
    server.kill()


def run(capsys, *args: str) -> str:
    assert main(["keys", *args]) == 0
    return capsys.readouterr().out


def test_create_list_revoke(capsys, place):
    out = run(
        capsys, "create", "acme", *place, "--requests-per-minute", "60", "--weight", "2.5",
        "--priority", "-3", "--slo-class", "batch",
    )  # fmt: skip
    key = out.split()[0]
    run(capsys, "create", "zeta", *place)
    header, acme, zeta = run(capsys, "list", *place).splitlines()
    assert header.split()[:2] == ["ID", "TENANT"]
    key_id = hash_key(key)[:12]
    assert acme.split() == [key_id, "acme", "2.5", "-3", "batch", "60", "-", "-"]
    assert zeta.split()[1] == "zeta"
    assert key not in acme + zeta
    assert run(capsys, "revoke", key_id, *place).split() == ["revoked", key_id]
    assert [line.split()[1] for line in run(capsys, "list", *place).splitlines()[1:]] == ["zeta"]


def test_key_itself_can_be_revoked_too(capsys, tmp_path):
    place = ["--file", str(tmp_path / "keys.json")]
    key = run(capsys, "create", "acme", *place).split()[0]
    assert hash_key(key) in read_keys(tmp_path / "keys.json")
    run(capsys, "revoke", key, *place)
    assert read_keys(tmp_path / "keys.json") == {}


@pytest.mark.parametrize("wrong", ["", "ab", "0123456789ab", "baton-unknown"])
def test_unknown_or_unclear_id_revokes_nothing(capsys, tmp_path, wrong):
    place = ["--file", str(tmp_path / "keys.json")]
    run(capsys, "create", "acme", *place)
    assert main(["keys", "revoke", wrong, *place]) == 2
    assert "baton keys list" in capsys.readouterr().err
    assert len(read_keys(tmp_path / "keys.json")) == 1


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["", "--weight", "1"], "tenant name"),
        (["a", "--weight", "0"], "weight"),
        (["a", "--requests-per-minute", "0"], "requests_per_minute"),
        (["a", "--priority", "101"], "priority"),
    ],
)
def test_wrong_values_are_refused(capsys, tmp_path, args, reason):
    path = tmp_path / "keys.json"
    assert main(["keys", "create", *args, "--file", str(path)]) == 2
    assert reason in capsys.readouterr().err
    assert not path.exists()


def test_store_that_is_away_is_one_clear_error(capsys):
    assert main(["keys", "list", "--redis", "redis://127.0.0.1:1/0"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("baton: error:") and "Traceback" not in err


def test_place_must_be_named(capsys):
    with pytest.raises(SystemExit):
        main(["keys", "list"])
    assert "--file" in capsys.readouterr().err
