"""The file in which a router copy says where it can be asked by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from services.router.copy_config import CopyConfig
from services.router.edge.scrape_target import (
    ScrapeTarget,
    read_target,
    read_targets,
    remove_target,
    write_target,
)


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_written_as_prometheus_reads_it(tmp_path: Path) -> None:
    target = ScrapeTarget("127.0.0.1:4711", "router-0", os.getpid())
    path = write_target(tmp_path / "targets", target)
    (group,) = json.loads(path.read_text())
    assert group["targets"] == ["127.0.0.1:4711"] and group["labels"]["copy"] == "router-0"
    assert all(isinstance(value, str) for value in group["labels"].values())
    assert read_targets(tmp_path / "targets") == [target]
    assert list((tmp_path / "targets").iterdir()) == [path]


def test_files_of_killed_copies_do_not_count_and_are_swept(tmp_path: Path, dead_pid: int) -> None:
    write_target(tmp_path, ScrapeTarget("127.0.0.1:1", "dead", dead_pid))
    assert read_targets(tmp_path) == []
    write_target(tmp_path, ScrapeTarget("127.0.0.1:2", "live", os.getpid()))
    assert [path.name for path in tmp_path.iterdir()] == ["live.json"]


def test_a_copy_removes_its_own_file_only(tmp_path: Path) -> None:
    old = ScrapeTarget("127.0.0.1:1", "router-0", os.getpid())
    new = ScrapeTarget("127.0.0.1:2", "router-0", os.getpid())
    write_target(tmp_path, new)
    remove_target(tmp_path, old)
    assert read_targets(tmp_path) == [new]
    remove_target(tmp_path, new)
    remove_target(tmp_path, new)
    assert read_targets(tmp_path) == []


@pytest.mark.parametrize(
    "text", ["", "junk", "{}", "[]", '[{"targets": []}]', '[{"targets": [1]}]']
)
def test_other_files_are_no_targets(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert read_target(tmp_path / "x.json") is None
    assert read_targets(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"copy\.targets_dir"):
        write_target(tmp_path / "file", ScrapeTarget("a:1", "x", 1))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"own_port": 70000}, "own_port"),
        ({"targets_dir": Path("/x")}, "own_port"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        CopyConfig(**values)  # type: ignore[arg-type]
