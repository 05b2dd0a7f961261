"""Reading a peer's blocks on another GPU of this host: its pool mapped, one kernel launch a read.

 1. Every pool is exported by a handle, which its card carries.
 2. A reader maps the pool of a peer whose process it watches.
 3. A read is one launch of `kernels.piece_copy` on a stream of its own, whatever the shapes of the
    two pools. It has ended when the event behind it has passed: from then on every launch of this
    process sees what arrived, so nothing else has to wait for it.
 4. A launch is not cancelled but waited for, since it takes milliseconds. So nothing is left in
    quarantine, unless the GPU itself hangs.

An owner that dies while it is read has freed its memory, and what a mapping of it gives then is
left open by the driver's manual: old bytes, or an error of the GPU. Old bytes, which is what H200s
gave, are thrown away with the read, which fails; the error would be met by the engine's next step
as well, which ends the worker. The mapping is closed behind its last launch. Neither process needs
to see the other's GPU (CUDA_VISIBLE_DEVICES).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from baton.core.errors import IncompatiblePeer, PeerGone, TransferError
from baton.core.worker_info import WorkerId
from kvtransfer.link import LinkBroken, OpenedPeer, Posted
from kvtransfer.mapped_memory import CudaMapper, Mapping, MemoryMapper
from kvtransfer.metadata import MappedEndpoint, PeerCard
from kvtransfer.peer_process import PeerProcess
from kvtransfer.plan import BlockIds, PairPlan
from kvtransfer.same_host import check_same_host
from kvtransfer.transport import PoolRegion

logger = logging.getLogger(__name__)

CANCEL_TIMEOUT_S = 1.0
"""Hundreds of times what a launch takes that is alone on its link."""
END_TIMEOUT_S = 5.0


class Launch(Protocol):
    """Both raise what the libraries raise when the GPU reports an error."""

    def is_done(self) -> bool: ...
    def wait(self, timeout_s: float) -> bool: ...


class PieceCopier(Protocol):
    """Copies pieces between mapped pools: `kernels.piece_stream.PieceStream`. Any thread may
    prepare copies. Raises what its libraries raise."""

    def side(
        self, address: int, offsets: NDArray[np.int64], *, block_bytes: int, piece_bytes: int
    ) -> Any: ...

    def prepare(self, src: Any, dst: Any) -> Any:
        """What `start` takes to copy between two sides. Takes the time that the first copy between
        two such sides would take."""
        ...

    def start(
        self, pieces: Any, src_units: NDArray[np.int32], dst_units: NDArray[np.int32]
    ) -> Launch:
        """Called on the mover's thread alone."""
        ...


@dataclass(slots=True, eq=False)
class _Peer:
    """Stays mapped until its last launch has ended."""

    worker_id: WorkerId
    process: PeerProcess
    mapping: Mapping
    pieces: Any
    """As the copier has prepared them."""
    layer_pieces: Any
    """Likewise of the plan by layer."""
    launches: list[Launch] = field(default_factory=list)
    is_dropped: bool = False
    is_closed: bool = False

    def close(self) -> None:
        self.is_dropped = True
        self.reap()

    def reap(self) -> None:
        """Forget launches that have ended; unmap a dropped peer behind the last of them."""
        self.launches = [launch for launch in self.launches if not _has_ended(launch)]
        if self.is_dropped and not self.launches and not self.is_closed:
            self.is_closed = True
            self.mapping.close()
            self.process.close()


class MappedLink:
    """Implements `PeerLink`. Everything but the constructor and `open_peer` runs on the mover's
    thread."""

    name = MappedEndpoint.transport
    lane = "mapped memory, copied by a kernel"
    reads_layers = True

    def __init__(
        self,
        region: PoolRegion,
        mapper: MemoryMapper,
        make_copier: Callable[[], PieceCopier],
    ) -> None:
        """`make_copier` is called once, on the mover's thread."""
        self._region = region
        self._mapper = mapper
        self._make_copier = make_copier
        self._copier: PieceCopier | None = None
        self._endpoint: MappedEndpoint | None = None
        self._peers: dict[WorkerId, _Peer] = {}
        self._ending: list[_Peer] = []
        """Dropped ones that a launch may still be reading."""

    @property
    def endpoint(self) -> MappedEndpoint | None:
        return self._endpoint

    def open(self) -> None:
        """Raises TransferError where device memory cannot be shared."""
        self._mapper.use()
        region = self._region
        self._endpoint = self._mapper.export(region.address, region.num_bytes)
        try:
            self._copier = self._copier or self._make_copier()
        except Exception as error:
            raise TransferError(f"the copying kernel does not work: {_first_line(error)}") from None

    def open_peer(
        self, card: PeerCard, plan: PairPlan, layer_plan: PairPlan | None = None
    ) -> _Peer:
        endpoint = card.endpoint(MappedEndpoint)
        if endpoint is None:
            raise IncompatiblePeer(f"{card.worker_id} does not offer it")
        check_same_host(card)
        if card.pool.num_bytes > endpoint.num_bytes:
            raise IncompatiblePeer(
                f"the pool of {card.worker_id} needs {card.pool.num_bytes} bytes, its card offers "
                f"{endpoint.num_bytes}"
            )
        process = PeerProcess(card.pid)
        try:
            mapping = self._mapper.open(endpoint, card.pool.num_bytes)
        except BaseException as error:
            is_dead = process.is_dead()
            process.close()
            if is_dead:
                raise PeerGone(f"{card.worker_id}: its process has ended") from error
            raise
        try:
            pieces = self._prepared(mapping, plan)
            layer_pieces = None if layer_plan is None else self._prepared(mapping, layer_plan)
        except BaseException as error:
            mapping.close()
            process.close()
            if isinstance(error, Exception):
                # A compiler's refusal, too little memory: another transport may do.
                raise IncompatiblePeer(
                    f"the pool of {card.worker_id} cannot be read: {_first_line(error)}"
                ) from None
            raise
        return _Peer(card.worker_id, process, mapping, pieces, layer_pieces)

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
            self._ending.append(known)
        self._reap()

    def post(
        self, peer: WorkerId, remote: BlockIds, local: BlockIds, *, by_layer: bool = False
    ) -> Posted | None:
        self._reap()
        known = self._peers.get(peer)
        if known is None or known.process.is_dead():
            raise PeerGone(f"{peer}: its process has ended")
        pieces = known.layer_pieces if by_layer else known.pieces
        assert self._copier is not None
        try:
            launch = self._copier.start(pieces, remote, local)
        except Exception as error:
            # Whatever the libraries of a GPU raise; nothing was launched that they know of.
            raise _broken(error) from None
        known.launches.append(launch)
        return _MappedPosted(known, launch)

    def needs_recycle(self, peer: WorkerId) -> bool:
        return False

    def recycle(self) -> None:
        """Waits for all launches; there is nothing else to rebuild."""
        for peer in (*self._peers.values(), *self._ending):
            if not all(_waited(launch, END_TIMEOUT_S) for launch in peer.launches):
                raise LinkBroken(f"the GPU has not ended a copy within {END_TIMEOUT_S:g} s")
        self._reap()

    def close(self) -> None:
        for peer in list(self._peers):
            self.drop_peer(peer)
        for known in self._ending:
            if not all(_waited(launch, END_TIMEOUT_S) for launch in known.launches):
                logger.error("a copy from %s does not end; it stays mapped", known.worker_id)
        self._reap()

    def _prepared(self, mapping: Mapping, plan: PairPlan) -> Any:
        """As the copier wants them, with its code for them ready."""
        copier = self._copier
        assert copier is not None
        remote, local = (
            copier.side(
                address, side.offsets, block_bytes=side.block_bytes, piece_bytes=side.piece_bytes
            )
            for address, side in (
                (mapping.address, plan.remote),
                (self._region.address, plan.local),
            )
        )
        return copier.prepare(remote, local)

    def _reap(self) -> None:
        for peer in (*self._peers.values(), *self._ending):
            peer.reap()
        self._ending = [peer for peer in self._ending if not peer.is_closed]


class _MappedPosted:
    """One launch, as the mover sees it."""

    def __init__(self, peer: _Peer, launch: Launch) -> None:
        self._peer = peer
        self._launch = launch

    def is_done(self) -> bool:
        try:
            is_done = self._launch.is_done()
        except Exception as error:
            raise _broken(error) from None
        if is_done and self._peer.process.is_dead():
            # It may have died before the last byte was read.
            raise PeerGone(f"{self._peer.worker_id}: its process has ended")
        return is_done

    def cancel(self) -> bool:
        """Waits for the launch, a few milliseconds."""
        return _waited(self._launch, CANCEL_TIMEOUT_S)

    def release(self) -> None:
        """The peer keeps the launch until it has ended."""


def cuda_link(region: PoolRegion) -> MappedLink:
    """For a pool in the memory of a GPU. Loads the tensor library."""
    if region.device_id is None:
        raise TransferError("the KV pool lies in host memory, which is not mapped by handle")
    device_id = region.device_id

    def make_copier() -> PieceCopier:
        from kernels.piece_stream import PieceStream

        return PieceStream(device_id)

    return MappedLink(region, CudaMapper(device_id), make_copier)


def _has_ended(launch: Launch) -> bool:
    try:
        return launch.is_done()
    except Exception:
        # The GPU runs nothing any more.
        return True


def _waited(launch: Launch, timeout_s: float) -> bool:
    try:
        return launch.wait(timeout_s)
    except Exception:
        return True


def _broken(error: Exception) -> LinkBroken:
    return LinkBroken(f"the GPU reports an error: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
