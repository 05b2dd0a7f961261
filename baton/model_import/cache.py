"""Where imported models and downloads lie, and who may write there at a time.

<cache>/downloads/<file>.gguf                    as fetched, checked by sha256
<cache>/models/<dtype>/<model name>/             a finished Hugging Face folder
<folder>/.<name>.lock, <folder>/.<name>.tmp-*    held and written while <name> is made
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from baton.core.errors import DeadlineExceeded

LOCK_POLL_S = 0.2


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """$XDG_CACHE_HOME/baton, or ~/.cache/baton.

    Source: https://specifications.freedesktop.org/basedir-spec/latest/ (relative paths are
    ignored)
    """
    configured = Path(environ.get("XDG_CACHE_HOME", ""))
    base = configured if configured.is_absolute() else Path.home() / ".cache"
    return base / "baton"


def model_dir(cache_dir: Path, *, model_name: str, dtype: str) -> Path:
    """The folder of an imported model. Its last part is the model's name."""
    return cache_dir / "models" / dtype / model_name


@contextmanager
def exclusive(
    target: Path, *, timeout_s: float, on_wait: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the right to create `target`, across processes; calls `on_wait` once if it is taken.

    The kernel drops the lock with the process, so a killed import blocks nobody.
    Raises DeadlineExceeded after `timeout_s`.
    """
    lock_file = target.parent / f".{target.name}.lock"
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    deadline_s = time.monotonic() + timeout_s
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        has_waited = False
        while not _try_lock(descriptor):
            if not has_waited:
                on_wait()
                has_waited = True
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(
                    f"another process has been making {target} for {timeout_s:.0f} s; "
                    "wait for it or end it"
                )
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
