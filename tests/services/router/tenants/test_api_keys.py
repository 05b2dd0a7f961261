"""Key files: written, read, followed, and broken ones."""

from __future__ import annotations

import json
import os
import stat

import pytest

from baton.core.clock import ManualClock
from baton.core.errors import ConfigError
from services.router.shared.state import QuotaLimits, TenantRecord, hash_key
from services.router.tenants.api_keys import FileKeys, KeyFile, new_key, read_keys, write_keys

ACME = TenantRecord("acme", QuotaLimits(60, None, 4), weight=2.0, priority=-3, slo_class="batch")


def test_keys_are_long_and_different_and_only_hashes_are_stored(tmp_path):
    path = tmp_path / "keys.json"
    keys = [new_key() for _ in range(20)]
    assert len(set(keys)) == 20 and all(len(key) > 40 for key in keys)
    write_keys(path, {hash_key(key): ACME for key in keys})
    text = path.read_text()
    assert not any(key in text for key in keys)
    assert read_keys(path) == {hash_key(key): ACME for key in keys}


def test_file_is_its_owners_alone_and_never_half_written(tmp_path):
    path = tmp_path / "keys.json"
    write_keys(path, {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["keys.json"]


async def test_editing(tmp_path):
    keys = FileKeys(tmp_path / "keys.json")
    assert await keys.list_keys() == {}
    await keys.write_key(hash_key("a"), ACME)
    await keys.write_key(hash_key("b"), TenantRecord("b"))
    assert await keys.delete_key(hash_key("a"))
    assert not await keys.delete_key(hash_key("a"))
    assert await keys.list_keys() == {hash_key("b"): TenantRecord("b")}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not valid JSON"),
        ("[]", "must hold"),
        ('{"format": 2, "keys": {}}', "must hold"),
        ('{"format": 1, "keys": []}', "must hold"),
        ('{"format": 1, "keys": {"secret": {"tenant": "a"}}}', "no SHA-256"),
        ({"tenant": ""}, "1 to 128"),
        ({"tenant": "a", "weight": -1}, "weight"),
        ({"tenant": "a", "weight": float("inf")}, "not valid JSON"),
        ({"tenant": "a", "limits": {"requests_per_minute": 0}}, "requests_per_minute"),
        ({"tenant": "a", "limits": 7}, "limits"),
        ({"tenant": "a", "colour": "red"}, "colour"),
        ({}, "tenant"),
        (7, "JSON object"),
    ],
)
async def test_broken_file_is_refused_with_a_reason_and_no_key_is_shown(tmp_path, content, reason):
    path = tmp_path / "keys.json"
    if not isinstance(content, str):
        content = json.dumps({"format": 1, "keys": {"ab" * 32: content}})
    path.write_text(content)
    with pytest.raises(ConfigError, match=reason) as error:
        KeyFile(path, clock=ManualClock())
    assert "ab" * 32 not in str(error.value)


def test_missing_file_is_an_error_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="baton keys create"):
        KeyFile(tmp_path / "none.json", clock=ManualClock())


async def test_changes_are_followed_and_a_broken_file_changes_nothing(tmp_path, caplog):
    path, clock = tmp_path / "keys.json", ManualClock()
    write_keys(path, {hash_key("old"): ACME})
    keys = KeyFile(path, clock=clock)
    assert await keys.owner(hash_key("old")) == ACME
    assert await keys.owner(hash_key("new")) is None
    write_keys(path, {hash_key("new"): TenantRecord("b")})
    assert await keys.owner(hash_key("new")) is None, "not looked at again so soon"
    clock.advance(1.0)
    assert await keys.owner(hash_key("new")) == TenantRecord("b")
    assert await keys.owner(hash_key("old")) is None
    path.write_text("{")
    clock.advance(1.0)
    assert await keys.owner(hash_key("new")) == TenantRecord("b")
    assert "stay valid" in caplog.text
    path.unlink()
    clock.advance(1.0)
    assert await keys.owner(hash_key("new")) is None, "a file that is gone holds no keys"
    write_keys(path, {hash_key("new"): ACME})
    clock.advance(1.0)
    assert await keys.owner(hash_key("new")) == ACME


async def test_almost_the_right_key_is_none(tmp_path):
    path = tmp_path / "keys.json"
    key_hash = hash_key("right")
    write_keys(path, {key_hash: ACME})
    keys = KeyFile(path, clock=ManualClock())
    assert await keys.owner(key_hash[:-1] + ("0" if key_hash[-1] != "0" else "1")) is None
