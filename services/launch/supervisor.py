"""Child processes: started, restarted when they exit, and ended.

    spawn ── exits ──► wait (backoff, doubling up to a limit) ──► spawn ...
      ├── keep_down(): as it is, but not started again once it exits
      ├── end(): SIGTERM, after its time SIGKILL, and forgotten
      └── stop(): SIGTERM to all, then SIGKILL to what is left after the grace period

Children run in sessions of their own, so a Ctrl-C on the terminal reaches only the supervisor,
and die with it if it is killed (`--exit-with-parent`). The kernel ties them to the thread that
spawns them, so only `poll` and `start` do, and those are calls of one thread that lasts.

Does not know: what the children are for.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from baton.core.config import ENV_PREFIX
from baton.process import EXIT_CONFIG

logger = logging.getLogger(__name__)

RESTART_BACKOFF_S = 0.5
RESTART_BACKOFF_MAX_S = 10.0
STABLE_AFTER_S = 30.0
"""A child that ran this long starts again without delay when it dies."""
FRONT_GRACE_S = 3.0
"""Of the time to stop, what the router may take before the workers are told."""
MAX_EARLY_EXITS = 3
"""A child that dies this often before the system was ever ready will not get better."""
TAIL_LINES = 15


@dataclass(slots=True)
class Child:
    """One supervised process."""

    name: str
    command: Sequence[str]
    log_file: Path
    process: subprocess.Popen[bytes] | None = None
    started_at_s: float = 0.0
    backoff_s: float = RESTART_BACKOFF_S
    restart_at_s: float = 0.0
    num_exits: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside what it inherits."""
    is_front: bool = False
    """Clients talk to it; it ends before the others."""
    is_misconfigured: bool = False
    """It said itself that starting it again will not help."""
    is_kept_down: bool = False
    """It is not started again."""
    ends_by_s: float | None = None
    """It was told to end; killed when this has passed."""

    @property
    def pid(self) -> int | None:
        return None if self.process is None else self.process.pid

    @property
    def will_not_start(self) -> bool:
        return self.is_misconfigured or self.num_exits >= MAX_EARLY_EXITS

    def log_tail(self) -> str:
        try:
            lines = self.log_file.read_text(errors="replace").splitlines()
        except OSError as error:
            return f"({self.log_file}: {error.strerror})"
        return "\n".join(lines[-TAIL_LINES:])


@dataclass(slots=True)
class Supervisor:
    """`start`, `poll` and `stop` are called by one thread; all else by any."""

    children: list[Child] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _is_stopping: bool = False

    def start(self, child: Child) -> None:
        with self._lock:
            self.children.append(child)
            self._spawn(child)

    def add(self, child: Child) -> None:
        """Started by the next `poll`."""
        with self._lock:
            self.children.append(child)

    def find(self, name: str) -> Child | None:
        with self._lock:
            return next((child for child in self.children if child.name == name), None)

    def all(self) -> list[Child]:
        with self._lock:
            return list(self.children)

    def keep_down(self, child: Child) -> None:
        """It may exit from now on, and is then forgotten."""
        with self._lock:
            child.is_kept_down = True

    def end(self, child: Child, *, within_s: float) -> None:
        """SIGTERM now, SIGKILL when it is still there after `within_s`; then forgotten."""
        with self._lock:
            child.is_kept_down = True
            child.ends_by_s = time.monotonic() + within_s
            if child.process is not None and child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)

    def poll(self) -> None:
        """Restart what has exited and waited long enough; forget what was to end and has."""
        with self._lock:
            if self._is_stopping:
                return
            now_s = time.monotonic()
            for child in list(self.children):
                self._poll_child(child, now_s)

    def hopeless(self) -> str | None:
        """Why the system will not come up: a child that keeps dying, with the end of its log."""
        for child in self.all():
            if child.will_not_start:
                times = "once" if child.num_exits == 1 else f"{child.num_exits} times"
                return f"{child.name} exited {times}; the end of its log:\n{child.log_tail()}"
        return None

    def ready(self) -> None:
        """Nothing more is due."""

    def stop(self, *, grace_s: float) -> None:
        """End all children, the routers first: no request meets half a system."""
        with self._lock:
            self._is_stopping = True
        deadline = time.monotonic() + grace_s
        front = min(deadline, time.monotonic() + FRONT_GRACE_S)
        _end([child for child in self.all() if child.is_front], front)
        _end([child for child in self.all() if not child.is_front], deadline)

    def _poll_child(self, child: Child, now_s: float) -> None:
        if child.process is not None:
            code = child.process.poll()
            if code is None:
                self._kill_late(child, now_s)
                return
            child.process = None
            child.num_exits += 1
            child.is_misconfigured = code == EXIT_CONFIG
            if not child.is_kept_down:
                self._restart_later(child, code, now_s)
        if child.is_kept_down and child.process is None:
            self.children.remove(child)
        elif child.process is None and now_s >= child.restart_at_s:
            self._spawn(child)

    def _kill_late(self, child: Child, now_s: float) -> None:
        if child.ends_by_s is None or now_s < child.ends_by_s:
            return
        assert child.process is not None
        logger.warning("%s has not ended in its time and is killed", child.name)
        child.ends_by_s = None
        child.process.kill()

    def _restart_later(self, child: Child, code: int, now_s: float) -> None:
        if now_s - child.started_at_s >= STABLE_AFTER_S:
            child.backoff_s = RESTART_BACKOFF_S
        child.restart_at_s = now_s + child.backoff_s
        logger.warning(
            "%s exited with code %s; restarting in %.1f s", child.name, code, child.backoff_s
        )
        child.backoff_s = min(child.backoff_s * 2, RESTART_BACKOFF_MAX_S)

    def _spawn(self, child: Child) -> None:
        with child.log_file.open("ab") as log:
            child.process = subprocess.Popen(
                child.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**_inherited_environment(), **child.environment},
            )
        child.started_at_s = time.monotonic()


def _end(children: Sequence[Child], deadline: float) -> None:
    """SIGTERM, and SIGKILL to what is left at `deadline` (monotonic)."""
    living = [c.process for c in children if c.process and c.process.poll() is None]
    for process in living:
        process.send_signal(signal.SIGTERM)
    for process in living:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _inherited_environment() -> dict[str, str]:
    """Ours without settings: those are in each child's file already, ranked as documented."""
    return {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}
