"""Which transports a worker offers and reads by, decided once at its start.

    auto     all that work here are offered, and each peer is read by the first that reaches it:
             shm, nixl, socket for a pool in host memory, mapped, nixl for one on a GPU
    a name   this one alone, for peers of this worker and for itself as a reader

So that shm stays possible, a pool for `auto` is always made of shareable memory. What is offered
and why something is not goes to the log; which link serves a peer is decided at its connection.
"""

from __future__ import annotations

import ctypes
import logging
import os
from enum import Enum

from baton.core.errors import ConfigError
from kvtransfer.block_read import MoverLimits
from kvtransfer.link import PeerLink
from kvtransfer.metadata import PeerIdentity
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.nixl_library import is_installed
from kvtransfer.nixl_transport import NixlLink
from kvtransfer.peer_process import allow_reads_by_siblings, read_memory
from kvtransfer.shm_transport import ShmLink, ShmPool
from kvtransfer.socket_link import SocketConfig, SocketLink
from kvtransfer.transport import PoolRegion

logger = logging.getLogger(__name__)


class TransportKind(Enum):
    """The setting."""

    AUTO = "auto"
    NIXL = "nixl"
    MAPPED = "mapped"
    SHM = "shm"
    SOCKET = "socket"


_OF_HOST_MEMORY = (TransportKind.SHM, TransportKind.NIXL, TransportKind.SOCKET)
"""Best first. A copy out of a peer's mapped memory runs at the rate of memcpy; NIXL has the kernel
copy (process_vm_readv), which pins every page and reaches a third of it."""
_OF_GPU_MEMORY = (TransportKind.MAPPED, TransportKind.NIXL)
"""Best first."""
GPU_LIMITS = MoverLimits(max_piece_bytes=512 << 20, max_bytes_in_flight=1 << 30, min_poll_s=0.00001)
"""A link of hundreds of GB/s moves a piece in a millisecond and a half, and each costs a launch."""


def needs_shared_pool(kind: TransportKind | str) -> bool:
    """True when the pool's memory must come from `ShmPool`."""
    return _kind(kind) in (TransportKind.AUTO, TransportKind.SHM)


def create_transport(
    kind: TransportKind | str,
    region: PoolRegion,
    identity: PeerIdentity,
    secret: bytes,
    *,
    shared_pool: ShmPool | None = None,
    limits: MoverLimits | None = None,
    socket: SocketConfig | None = None,
) -> MoverTransport:
    """The transport over `region`; `shared_pool` holds it where `needs_shared_pool` said so, and
    `socket` says where blocks are served over TCP.

    Blocks for about half a second with NIXL. Raises ConfigError or TransferError.
    """
    wanted = _kind(kind)
    if not secret:
        raise ConfigError("the cluster secret is empty; give all workers the same non-empty one")
    possible = _OF_HOST_MEMORY if region.device_id is None else _OF_GPU_MEMORY
    names = [name for name in possible if wanted in (name, TransportKind.AUTO)]
    if not names:
        where = "host memory" if region.device_id is None else "GPU memory"
        raise ConfigError(
            f"transport {wanted.value} does not move KV in {where}; take auto or one of "
            f"{', '.join(name.value for name in possible)}"
        )
    obstacle = ""
    if wanted is TransportKind.AUTO:
        obstacle = nixl_obstacle(on_gpu=region.device_id is not None)
        if obstacle:
            names.remove(TransportKind.NIXL)
    links = [_link(name, region, identity, secret, shared_pool, socket) for name in names]
    transport = MoverTransport(
        links=links,
        region=region,
        identity=identity,
        secret=secret,
        limits=limits or (None if region.device_id is None else GPU_LIMITS),
    )
    if obstacle:
        transport.obstacles[TransportKind.NIXL.value] = obstacle
    logger.info("KV transports: %s", ", ".join(transport.names))
    for name, reason in transport.obstacles.items():
        logger.info("KV transport %s is not usable: %s", name, reason)
    return transport


def _link(
    name: TransportKind,
    region: PoolRegion,
    identity: PeerIdentity,
    secret: bytes,
    shared_pool: ShmPool | None,
    socket: SocketConfig | None,
) -> PeerLink:
    if name is TransportKind.NIXL:
        return NixlLink(region, identity)
    if name is TransportKind.SOCKET:
        return SocketLink(region, identity, secret, config=socket)
    if name is TransportKind.MAPPED:
        # Loads the tensor library, which a worker without a GPU does well without.
        from kvtransfer.mapped_link import cuda_link

        return cuda_link(region)
    if shared_pool is None:
        raise ConfigError("transport shm needs a pool in shared memory (ShmPool)")
    return ShmLink(region, shared_pool)


def nixl_obstacle(*, on_gpu: bool = False) -> str:
    """Why NIXL cannot be used in this process, empty when nothing speaks against it."""
    if not is_installed():
        return "the package is not installed"
    if on_gpu:
        return ""
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
