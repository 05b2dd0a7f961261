"""Which transport a worker uses, decided once at its start.

`auto` prefers NIXL and falls back to shared memory where NIXL is missing, may not read other
processes' memory, or cannot make an agent. So that this stays possible until the end, a pool for
`auto` is always made of shareable memory. The choice and its reason are logged.
"""

from __future__ import annotations

import ctypes
import logging
import os
from enum import Enum

from baton.core.errors import ConfigError, TransferError
from kvtransfer.metadata import PeerIdentity
from kvtransfer.mover import MoverLimits
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.nixl_transport import is_installed, nixl_transport
from kvtransfer.peer_process import allow_reads_by_siblings, read_memory
from kvtransfer.shm_transport import ShmPool, shm_transport
from kvtransfer.transport import PoolRegion

logger = logging.getLogger(__name__)


class TransportKind(Enum):
    """The setting. All workers of one deployment take the same."""

    AUTO = "auto"
    NIXL = "nixl"
    SHM = "shm"


def needs_shared_pool(kind: TransportKind | str) -> bool:
    """True when the pool's memory must come from `ShmPool`."""
    return _kind(kind) is not TransportKind.NIXL


def create_transport(
    kind: TransportKind | str,
    region: PoolRegion,
    identity: PeerIdentity,
    secret: bytes,
    *,
    shared_pool: ShmPool | None = None,
    limits: MoverLimits | None = None,
) -> MoverTransport:
    """The transport over `region`; `shared_pool` holds it where `needs_shared_pool` said so.

    Blocks for about half a second with NIXL. Raises ConfigError or TransferError.
    """
    wanted = _kind(kind)
    if not secret:
        raise ConfigError("the cluster secret is empty; give all workers the same non-empty one")
    reason = "as configured"
    if wanted is not TransportKind.SHM:
        obstacle = nixl_obstacle() if wanted is TransportKind.AUTO else ""
        if not obstacle:
            try:
                transport = nixl_transport(region, identity, secret, limits=limits)
            except TransferError as error:
                if wanted is TransportKind.NIXL:
                    raise
                obstacle = str(error)
            else:
                logger.info("KV transport: nixl (%s)", _why(wanted))
                return transport
        reason = f"NIXL is not usable: {obstacle}"
    if shared_pool is None:
        raise ConfigError("transport shm needs a pool in shared memory (ShmPool)")
    logger.info("KV transport: shm (%s)", reason)
    return shm_transport(region, shared_pool, identity, secret, limits=limits)


def nixl_obstacle() -> str:
    """Why NIXL cannot be used in this process, empty when nothing speaks against it."""
    if not is_installed():
        return "the package is not installed"
    allow_reads_by_siblings()
    sample = ctypes.create_string_buffer(b"baton", 5)
    try:
        found = read_memory(os.getpid(), ctypes.addressof(sample), 5)
    except (OSError, AttributeError) as error:
        return f"process_vm_readv does not work here ({error})"
    return "" if found == b"baton" else "process_vm_readv returned wrong bytes"


def _kind(kind: TransportKind | str) -> TransportKind:
    try:
        return TransportKind(kind)
    except ValueError:
        names = ", ".join(k.value for k in TransportKind)
        raise ConfigError(f"transport must be one of {names}, got {kind!r}") from None


def _why(wanted: TransportKind) -> str:
    return "as configured" if wanted is TransportKind.NIXL else "installed and permitted"
