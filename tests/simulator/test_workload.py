"""Traces as arrivals."""

from __future__ import annotations

import gzip
import json

import pytest

from baton.core.errors import ConfigError
from baton.simulator.workload import read_mooncake


def write(path, rows):
    text = "\n".join(json.dumps(row) for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def row(timestamp=0, length=1200, output=5, ids=(0, 1, 2)):
    return {
        "timestamp": timestamp, "input_length": length, "output_length": output, "hash_ids": ids,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_equal_names_at_equal_positions_are_equal_prefixes(tmp_path, name):
    rows = [row(ids=[0, 1, 2]), row(ids=[0, 1, 9]), row(ids=[5, 1, 2])]
    one, two, three = read_mooncake(write(tmp_path / name, rows))
    assert one.block_hashes == two.block_hashes
    assert not set(one.block_hashes) & set(three.block_hashes)


def test_only_full_blocks_have_hashes(tmp_path):
    (arrival,) = read_mooncake(write(tmp_path / "t", [row(length=1535)]))
    assert len(arrival.block_hashes) == 2


def test_bursts_are_spread_over_the_gap_and_speed_shortens_it(tmp_path):
    rows = [row(0), row(0), row(3000), row(3000), row(3000)]
    path = write(tmp_path / "t", rows)
    assert [a.at_s for a in read_mooncake(path)][:3] == [0, 1.5, 3]
    assert [a.at_s for a in read_mooncake(path, speed=2)][:3] == [0, 0.75, 1.5]
    assert len(read_mooncake(path, limit=2)) == 2


@pytest.mark.parametrize("line", ["{", '{"timestamp": 1}', '{"timestamp": "x"}', "[]"])
def test_line_of_another_format_is_named(tmp_path, line):
    path = tmp_path / "t"
    path.write_text(json.dumps(row()) + "\n" + line)
    with pytest.raises(ConfigError, match="line 2"):
        read_mooncake(path)


def test_speed_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="got 0"):
        read_mooncake(write(tmp_path / "t", [row()]), speed=0)
