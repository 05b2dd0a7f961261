"""NIXL as a library: found, imported under the environment it needs, agents made. The one importer.

What shapes this file, measured with NIXL 1.5.1:

* UCX would emulate a read that it cannot do in one step, and such a read over TCP can kill the
  process it reads from. Hence it may not emulate: what it then reads, it reads without a copy on
  the way.
* The Python API starts a spinning progress thread; the delay below lets it sleep.
* A network device that does not exist would only show as peers that cannot be reached.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

from baton.core.errors import TransferError

PROGRESS_DELAY_US = 1000
"""Pause of UCX's progress thread. 0 spins on a core; reads of host memory do not wait for it."""
_MODULES = ("nixl_cu13._api", "nixl._api")
_NET_DEVICES = "UCX_NET_DEVICES"
_DEVICE_FOLDERS = (Path("/sys/class/net"), Path("/sys/class/infiniband"))
_UCX_DEFAULTS = {
    # Bookkeeping traffic only; UCX would open a listener on every interface.
    _NET_DEVICES: "lo",
    # Without a bound the registration cache keeps what it released.
    "UCX_RCACHE_MAX_UNRELEASED": "1024",
}
_UCX_REQUIRED = {
    # A read that UCX cannot do in one step must fail instead of becoming a message exchange.
    "UCX_PROTO_EMULATION_ENABLE": "n",
}


def is_installed() -> bool:
    """True when a NIXL package can be found; does not import it."""
    return any(importlib.util.find_spec(name.partition(".")[0]) for name in _MODULES)


def errors_of(api: Any) -> tuple[type[Exception], ...]:
    bindings = vars(api.nixlBind)
    return tuple(
        value
        for name, value in bindings.items()
        if name.startswith("nixl") and name.endswith("Error")
    )


def check_network_devices() -> None:
    """A device that does not exist would only show as peers that cannot be reached."""
    names = [name.partition(":")[0] for name in os.environ.get(_NET_DEVICES, "all").split(",")]
    present = {
        path.name for folder in _DEVICE_FOLDERS if folder.is_dir() for path in folder.iterdir()
    }
    missing = [name for name in names if name != "all" and name not in present]
    if missing:
        raise TransferError(
            f"{_NET_DEVICES} names {', '.join(missing)}, this machine has "
            f"{', '.join(sorted(present))}; correct it or leave it out"
        )


def load() -> Any:
    """The NIXL module, imported under the environment it needs."""
    for name, value in _UCX_DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(_UCX_REQUIRED)
    raise_exceptions = logging.raiseExceptions
    for name in _MODULES:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            continue
        api = importlib.import_module(name)
        # Importing NIXL sends its log lines to standard output and silences logging's errors.
        logging.raiseExceptions = raise_exceptions
        nixl_logger = logging.getLogger("nixl")
        nixl_logger.handlers.clear()
        nixl_logger.propagate = True
        nixl_logger.setLevel(logging.WARNING)
        return api
    raise TransferError("NIXL is not installed; install nixl-cu13 or set the KV transport to shm")


def make_agent(api: Any, name: str) -> Any:
    """An agent with a sleeping progress thread, whose delay the Python API fixes to 0."""
    bindings = api.nixlBind
    real = bindings.nixlAgent

    def make(agent_name: str, config: Any) -> Any:
        config.pthrDelay = PROGRESS_DELAY_US
        return real(agent_name, config)

    config = api.nixl_agent_config(sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW)
    bindings.nixlAgent = make
    try:
        return api.nixl_agent(name, config)
    finally:
        bindings.nixlAgent = real
