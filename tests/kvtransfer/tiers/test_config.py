from dataclasses import replace
from pathlib import Path

import pytest

from baton.core.clock import ManualClock
from baton.core.config import build
from baton.core.errors import ConfigError
from kvtransfer.tiers.config import TierConfig
from kvtransfer.tiers.tiers import build_tiers

GIB = 1 << 30


def test_no_tiers_by_default(layout):
    assert not TierConfig().is_enabled
    assert build_tiers(TierConfig(), layout, clock=ManualClock()) is None


def test_settings_come_from_text(tmp_path):
    settings = {"host_bytes": GIB, "disk_bytes": GIB, "disk_path": str(tmp_path)}
    assert build(TierConfig, settings).disk_path == tmp_path


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"host_bytes": -1}, "host_bytes must not be negative, got -1"),
        ({"host_bytes": GIB, "disk_bytes": GIB}, "without a directory"),
        ({"host_bytes": GIB, "disk_path": Path("/kv")}, "disk_bytes is 0"),
        ({"disk_bytes": GIB, "disk_path": Path("/kv")}, "host_bytes is 0"),
        ({"save_bytes_per_second": 0}, "save_bytes_per_second must be positive"),
        ({"save_below_free_ratio": 1.5}, "between 0 and 1, got 1.5"),
        ({"flush_timeout_s": -1.0}, "flush_timeout_s must not be negative"),
    ],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ConfigError, match=says):
        TierConfig(**settings)


def test_tier_below_one_block_is_refused(layout, tmp_path):
    config = TierConfig(host_bytes=layout.block_bytes - 1)
    with pytest.raises(
        ConfigError, match=f"host_bytes {layout.block_bytes - 1} is below one block"
    ):
        build_tiers(config, layout, clock=ManualClock())
    config = TierConfig(host_bytes=GIB, disk_bytes=layout.block_bytes, disk_path=tmp_path / "kv")
    with pytest.raises(ConfigError, match="below one block of 32768 bytes with its index"):
        build_tiers(config, layout, clock=ManualClock())


def test_building_touches_no_files(layout, tmp_path):
    config = TierConfig(host_bytes=GIB, disk_bytes=GIB, disk_path=tmp_path / "kv")
    tiers = build_tiers(replace(config, check_host_memory=True), layout, clock=ManualClock())
    assert tiers is not None
    assert not (tmp_path / "kv").exists()
    assert tiers.piece_blocks == 256
    host, disk = tiers.reports()
    assert (host.max_bytes, disk.max_bytes) == (GIB, GIB)
    assert disk.reason == "not opened yet"
