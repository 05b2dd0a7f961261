"""The gRPC contract: buf's style, and nothing that breaks those who speak the last release's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools.proto_contract import BASELINE, PROTO, buf


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of the contract to damage."""
    shutil.copytree(PROTO / "v1", tmp_path / "v1")
    return tmp_path


def test_contract_follows_the_style() -> None:
    done = buf("lint")
    assert done.returncode == 0, done.stdout


def test_contract_keeps_what_was_released() -> None:
    done = buf("breaking", "--against", BASELINE)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("string model = 1;", "int64 model = 1;"),
        ("string model = 1;", ""),
        ("rpc ListModels(", "rpc ListAllModels("),
    ],
    ids=["type", "field", "method"],
)
def test_a_breaking_change_would_be_seen(changed: Path, old: str, new: str) -> None:
    file = changed / "v1/inference.proto"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    done = buf("breaking", "--against", BASELINE, proto=changed)
    assert done.returncode == 100 and "inference.proto" in done.stdout


def test_a_break_of_style_would_be_seen(changed: Path) -> None:
    file = changed / "v1/inference.proto"
    file.write_text(file.read_text().replace("string content = 2;", "string Content = 2;"))
    done = buf("lint", proto=changed)
    assert done.returncode == 100 and "Content" in done.stdout
