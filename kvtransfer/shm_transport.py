"""Reading blocks from a peer's pool through shared memory: for tests and hosts without NIXL.

The pool of every worker lies in a memfd: memory without a name, freed by the kernel with its last
user, so a killed worker leaves nothing behind, and not limited by the size of /dev/shm. A reader
opens it through /proc/<pid>/fd/<n>, which the kernel grants to processes of the same user (no
ptrace right is needed), maps it read-only and copies. A copy of ours is over when the call is
over: nothing can land late, and a stopped peer does not hinder us.

The canary lies behind the pool, in the last page of the file.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baton.core.errors import ConfigError, IncompatiblePeer, PeerGone
from baton.core.worker_info import WorkerId
from kvtransfer.link import OpenedPeer, Posted
from kvtransfer.metadata import CANARY_BYTES, PeerCard, ShmEndpoint
from kvtransfer.peer_process import PeerProcess
from kvtransfer.plan import BlockIds, PairPlan
from kvtransfer.same_host import check_same_host
from kvtransfer.transport import PoolRegion


class ShmPool:
    """Writable memory of this process that others may map read-only."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.canary_offset = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.file_bytes = self.canary_offset + mmap.PAGESIZE
        self.canary = secrets.token_bytes(CANARY_BYTES)
        self.fd = os.memfd_create("baton-kv-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(self.fd, 0o600)
        os.ftruncate(self.fd, self.file_bytes)
        # The size never changes again: a reader's mapping cannot be cut off under it.
        fcntl.fcntl(
            self.fd,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        )
        self._map = mmap.mmap(self.fd, self.file_bytes, flags=mmap.MAP_SHARED)
        self._map[self.canary_offset : self.canary_offset + CANARY_BYTES] = self.canary
        self.memory = memoryview(self._map)[:num_bytes]
        self.address = _address_of(self._map)

    @classmethod
    def create(cls, num_bytes: int) -> ShmPool:
        """Zeroed memory; pages become resident when first written. Raises ConfigError."""
        if num_bytes < 1:
            raise ConfigError(f"a pool needs at least 1 byte, got {num_bytes}")
        return cls(num_bytes)

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def close(self) -> None:
        """Give up our name for the memory. It is freed when its last user is gone."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(slots=True, eq=False)
class _Peer:
    process: PeerProcess
    pool: NDArray[np.uint8]
    """[num_bytes], read-only; keeps the mapping alive."""
    plan: PairPlan
    layer_plan: PairPlan | None

    def close(self) -> None:
        self.process.close()


class ShmLink:
    """Copies on the mover's thread; every piece is done when `post` returns."""

    name = ShmEndpoint.transport
    lane = "mapped memory"
    reads_layers = True

    def __init__(self, region: PoolRegion, pool: ShmPool) -> None:
        offset = region.address - pool.address
        if not 0 <= offset <= pool.num_bytes - region.num_bytes:
            raise ConfigError("the KV pool does not lie in the shared memory made for it")
        self.endpoint = ShmEndpoint(
            path=pool.path,
            file_bytes=pool.file_bytes,
            pool_offset=offset,
            canary_offset=pool.canary_offset,
            canary=pool.canary,
        )
        self._peers: dict[WorkerId, _Peer] = {}
        content = np.frombuffer(pool.memory, dtype=np.uint8)
        self._pool = content[offset : offset + region.num_bytes]

    def open(self) -> None:
        """Nothing to set up."""

    def open_peer(
        self, card: PeerCard, plan: PairPlan, layer_plan: PairPlan | None = None
    ) -> _Peer:
        endpoint = card.endpoint(ShmEndpoint)
        if endpoint is None:
            raise IncompatiblePeer(f"{card.worker_id} does not offer it")
        check_same_host(card)
        process = PeerProcess(card.pid)
        try:
            content = _map_readonly(card, endpoint)
            at = endpoint.canary_offset
            if content[at : at + CANARY_BYTES].tobytes() != endpoint.canary:
                raise PeerGone(f"process {card.pid} is not {card.worker_id} any more")
            num_bytes = card.pool.num_bytes
            if endpoint.pool_offset + num_bytes > len(content):
                raise IncompatiblePeer(
                    f"the pool of {card.worker_id} has {num_bytes} bytes, its file {len(content)}"
                )
        except BaseException:
            process.close()
            raise
        pool = content[endpoint.pool_offset : endpoint.pool_offset + num_bytes]
        return _Peer(process, pool, plan, layer_plan)

    def add_peer(self, peer: WorkerId, opened: OpenedPeer) -> None:
        assert isinstance(opened, _Peer)
        self._peers[peer] = opened

    def is_peer_dead(self, peer: WorkerId) -> bool:
        known = self._peers.get(peer)
        return known is None or known.process.is_dead()

    def drop_peer(self, peer: WorkerId) -> None:
        known = self._peers.pop(peer, None)
        if known is not None:
            known.close()

    def post(
        self, peer: WorkerId, remote: BlockIds, local: BlockIds, *, by_layer: bool = False
    ) -> Posted | None:
        known = self._peers.get(peer)
        if known is None or known.process.is_dead():
            raise PeerGone(f"{peer}: its process has ended")
        source, target = known.pool, self._pool
        plan = known.layer_plan if by_layer else known.plan
        assert plan is not None
        for there, here, num_bytes in plan.copies(remote, local):
            np.copyto(target[here : here + num_bytes], source[there : there + num_bytes])
        return None

    def needs_recycle(self, peer: WorkerId) -> bool:
        return False

    def recycle(self) -> None:
        """Nothing of ours is ever in flight between two calls."""

    def close(self) -> None:
        for peer in list(self._peers):
            self.drop_peer(peer)


def _map_readonly(card: PeerCard, endpoint: ShmEndpoint) -> NDArray[np.uint8]:
    """The peer's file as bytes. Raises PeerGone or IncompatiblePeer."""
    try:
        fd = os.open(endpoint.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise PeerGone(f"{card.worker_id}: its memory is gone") from None
    except OSError as error:
        raise IncompatiblePeer(
            f"memory of {card.worker_id} cannot be opened ({error.strerror}); "
            "run both workers as the same user"
        ) from None
    try:
        if os.fstat(fd).st_size != endpoint.file_bytes or not _is_fixed_size(fd):
            raise PeerGone(f"{card.worker_id}: its memory is not the announced one")
        content = mmap.mmap(fd, endpoint.file_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    return np.frombuffer(content, dtype=np.uint8)


def _is_fixed_size(fd: int) -> bool:
    """A file that its owner could shrink would kill its readers with SIGBUS."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


def _address_of(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
