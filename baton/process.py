"""What every process of the platform does alike: its common options, signals, and its parent."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>: the signal this process gets when its parent ends."""
EXIT_FAILED = 1
EXIT_CONFIG = 2
"""Wrong settings: starting again will not help."""


def process_exists(pid: int) -> bool:
    """On this machine, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def add_settings_arguments(parser: argparse.ArgumentParser, *, example: str) -> None:
    """--config and --set, see `baton.settings.load`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.FIELD=VALUE",
        help=f"one setting, e.g. --set {example}; may be repeated",
    )


def add_parent_argument(parser: argparse.ArgumentParser) -> None:
    """--exit-with-parent, see `exit_with_parent`."""
    parser.add_argument(
        "--exit-with-parent",
        type=int,
        metavar="PID",
        help="stop when the process PID, which must be the parent, ends",
    )


def exit_with_parent(parent_pid: int | None) -> None:
    """SIGTERM for this process when its parent ends, however it ends. Nothing for None.

    The kernel watches the thread that started this process, so that thread must live as long as
    the parent. Linux only.
    """
    if parent_pid is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        # The parent was faster to end than we were to ask.
        raise SystemExit(EXIT_FAILED)


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set, on the running loop."""
    requested = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, requested.set)
    return requested
