"""What runs beside the steps in a rank's process on behalf of the worker, such as moving its KV.

    worker ─► RankServiceSpec ─► rank's process: load_service ─► make_pool ─► start ─► steps

The service is named by a text, because the engine knows no such service: whoever builds the
engine does. It speaks to the worker over a socket of its own (`RankGroup.take_service_sockets`).

Not known here: what a service does and says.
"""

from __future__ import annotations

import importlib
import socket
from dataclasses import dataclass
from typing import Protocol

from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout
from baton.engine.host_memory import PoolMemory
from baton.engine.parallel import Parallel


@dataclass(frozen=True, slots=True)
class RankServiceSpec:
    """Which service every rank but the first starts. Pickled on its way there."""

    target: str
    """module:function, called with `settings` and the socket; returns a `RankService`."""
    settings: object


@dataclass(frozen=True, slots=True)
class RankKv:
    """The KV pool of a rank, ready to be read by others."""

    layout: KvLayout
    """Of the whole model."""
    parallel: Parallel
    """Which part of the heads lies here."""
    num_blocks: int
    num_scratch_blocks: int
    address: int
    num_bytes: int
    device_id: int | None
    """CUDA ordinal, None for host memory."""


class RankService(Protocol):
    """Lives in the process of one rank, and ends with it."""

    def make_pool(self, num_bytes: int) -> PoolMemory:
        """Memory for a pool of the rank's own that others can read; for ranks on a CPU."""
        ...

    def start(self, kv: RankKv) -> None:
        """Called once, before the first step. Returns when the service runs, on its own thread.

        Raises BatonError when it cannot; the rank, and with it the group, is then lost.
        """
        ...


def load_service(spec: RankServiceSpec, connection: socket.socket) -> RankService:
    """In the rank's process. Raises ConfigError when there is no such service."""
    module, _, name = spec.target.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"rank service {spec.target!r} cannot be loaded: {error}") from error
    service: RankService = factory(spec.settings, connection)
    return service
