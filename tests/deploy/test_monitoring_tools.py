"""How the tests come to Prometheus and Alertmanager, and what they say when they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from monitoring_tools import monitoring_tools


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder with commands; nothing is in the cache."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_installed_tools_go_first(path: Path) -> None:
    for name in ("prometheus", "promtool", "amtool", "alertmanager"):
        command(path, name, "exit 0")
    tools = monitoring_tools()
    assert tools.promtool == path / "promtool"
    assert tools.alertmanager == (str(path / "alertmanager"),)


def test_without_a_package_manager_it_says_what_to_install(path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"prometheus-alertmanager.*there is no apt-get"):
        monitoring_tools()


def test_a_failed_download_says_why_and_leaves_nothing_behind(path: Path, tmp_path: Path) -> None:
    command(path, "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
    command(path, "dpkg", "exit 0")
    with pytest.raises(RuntimeError, match="Unable to locate package"):
        monitoring_tools()
    assert list((tmp_path / "cache/baton-tests").iterdir()) == []
