"""Reading blocks with NIXL (UCX).

What shapes this file, all measured with NIXL 1.5.1:

* No cancel and no time-out: deadlines and quarantine are the mover's; `recycle` destroys the agent,
  which alone stops what is in flight, and only once no object of it is referenced any more.
* A destroyed agent breaks the reads of all who read from it. So there are two: one that others
  read from, which lives as long as the link, and one that reads, which a recycle may destroy.
* On host memory UCX reads by process_vm_readv (CMA), inside the posting call. A peer whose canary
  we cannot read in this way is refused, since UCX could not read it either.
* A peer's agent that is removed makes its transfers look failed while they may still land. So a
  peer that is dropped stays attached until the last of its transfers is over.
* Adjacent descriptors with adjacent ids are merged by NIXL, strided lists make preparing free.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import secrets
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from baton.core.errors import IncompatiblePeer, PeerGone, TransferError
from baton.core.worker_info import WorkerId
from kvtransfer.cuda_driver import CudaDriver
from kvtransfer.link import LinkBroken, OpenedPeer, Posted
from kvtransfer.metadata import CANARY_BYTES, NixlEndpoint, PeerCard, PeerIdentity
from kvtransfer.nixl_library import check_network_devices, errors_of, load, make_agent
from kvtransfer.nixl_read import DEATH_CONFIRMED_S, NixlPeer, NixlRead
from kvtransfer.peer_process import PeerProcess, allow_reads_by_siblings, read_memory
from kvtransfer.plan import BlockIds, PairPlan, SidePlan
from kvtransfer.same_host import check_same_host
from kvtransfer.transport import PoolRegion

logger = logging.getLogger(__name__)

HOST_MEMORY, GPU_MEMORY = "DRAM", "VRAM"


@dataclass(slots=True, eq=False)
class _Agent:
    """A NIXL agent with the local pool registered."""

    core: Any
    registered: Any

    def close(self) -> None:
        """The registration before the agent; prepared lists go before both."""
        self.core.deregister_memory(self.registered)
        self.core.agent = None


class NixlLink:
    """Two agents over the local pool. Everything but the constructor and `open_peer` runs on the
    mover's thread."""

    name = NixlEndpoint.transport
    reads_layers = False

    def __init__(self, region: PoolRegion, identity: PeerIdentity) -> None:
        self._region = region
        self._identity = identity
        self._memory_type = HOST_MEMORY if region.device_id is None else GPU_MEMORY
        self._canary = ctypes.create_string_buffer(secrets.token_bytes(CANARY_BYTES), CANARY_BYTES)
        self._peers: dict[WorkerId, NixlPeer] = {}
        self._attached: Counter[bytes] = Counter()
        """Peers by name of their agent: one of them may be dropped and not over yet."""
        self._generation = 0
        self._api: Any = None
        self._owner: _Agent | None = None
        """Others read from it."""
        self._reader: _Agent | None = None
        self._condemned: list[weakref.ref[Any]] = []
        self._endpoint: NixlEndpoint | None = None

    @property
    def endpoint(self) -> NixlEndpoint | None:
        return self._endpoint

    @property
    def lane(self) -> str:
        """UCX may not emulate, so whatever it reads by copies nothing on the way."""
        return "cma" if self._memory_type == HOST_MEMORY else "cuda_ipc"

    def open(self) -> None:
        """Raises TransferError when no agent can be made on this machine."""
        allow_reads_by_siblings()
        check_network_devices()
        if self._region.device_id is not None:
            # UCX leaves GPUs out on a thread that has no context of one.
            CudaDriver(self._region.device_id).use()
        self._api = self._api or load()
        region, identity = self._region, self._identity
        name = f"{identity.worker_id}#{region.tp_rank}:{identity.epoch}"
        self._owner = self._open_agent(name)
        self._open_reader()
        self._endpoint = NixlEndpoint(
            agent_name=name,
            agent_blob=self._owner.core.get_agent_metadata(),
            pool_address=region.address,
            device_id=region.device_id or 0,
            memory_type=self._memory_type,
            canary_address=ctypes.addressof(self._canary),
            canary=self._canary.raw,
        )

    def _open_reader(self) -> None:
        identity = self._identity
        self._generation += 1
        self._reader = self._open_agent(
            f"{identity.worker_id}#{self._region.tp_rank}:{identity.epoch}:r{self._generation}"
        )

    def _open_agent(self, name: str) -> _Agent:
        region = self._region
        pool = (region.address, region.num_bytes, region.device_id or 0, "")
        try:
            core = make_agent(self._api, name)
            return _Agent(core, core.register_memory([pool], self._memory_type))
        except self._api.nixlBind.nixlBackendError as error:
            kind = type(error).__name__
            raise TransferError(
                f"no NIXL agent here ({kind}); set the KV transport to shm"
            ) from None

    def open_peer(
        self, card: PeerCard, plan: PairPlan, layer_plan: PairPlan | None = None
    ) -> NixlPeer:
        endpoint = card.endpoint(NixlEndpoint)
        if endpoint is None:
            raise IncompatiblePeer(f"{card.worker_id} does not offer it")
        check_same_host(card)
        process = PeerProcess(card.pid)
        try:
            # Now that the process is held it cannot be exchanged under us.
            check_readable(card, endpoint)
        except BaseException:
            process.close()
            raise
        return NixlPeer(card.worker_id, endpoint, plan, process)

    def add_peer(self, peer: WorkerId, opened: OpenedPeer) -> None:
        assert isinstance(opened, NixlPeer)
        try:
            self._attach(opened)
        except BaseException:
            opened.close()
            raise
        self._peers[peer] = opened

    def is_peer_dead(self, peer: WorkerId) -> bool:
        known = self._peers.get(peer)
        return known is None or known.process.is_dead()

    def drop_peer(self, peer: WorkerId) -> None:
        known = self._peers.pop(peer, None)
        if known is not None:
            known.is_dropped = True
            self._retire(known)

    def _retire(self, peer: NixlPeer) -> None:
        """Once a dropped peer has nothing in flight."""
        if peer.is_dropped and not peer.num_posted:
            self._detach(peer)
            peer.close()

    def post(
        self, peer: WorkerId, remote: BlockIds, local: BlockIds, *, by_layer: bool = False
    ) -> Posted | None:
        assert not by_layer
        known = self._peers.get(peer)
        if known is None or known.process.is_dead():
            raise PeerGone(f"{peer}: its process has ended")
        if self._reader is None:
            raise LinkBroken("the NIXL agent is being rebuilt")
        posted = NixlRead(self._reader.core, known, self._retire)
        posted.start(local, remote)
        if posted.is_complete:
            posted.release()
            return None
        if posted.has_failed and known.process.is_dead(wait_s=DEATH_CONFIRMED_S):
            posted.release()
            raise PeerGone(f"{peer}: its process has ended")
        # A failed one too: parts of it may have been posted, so its blocks are not free.
        return posted

    def needs_recycle(self, peer: WorkerId) -> bool:
        return peer in self._peers

    def recycle(self) -> None:
        """An agent whose end is not certain stays condemned; the next call asks again."""
        if self._reader is not None:
            for peer in self._peers.values():
                self._detach(peer)
            self._condemned.append(weakref.ref(self._reader.core.agent))
            self._close_reader()
        gc.collect()
        self._condemned = [core for core in self._condemned if core() is not None]
        if self._condemned:
            raise LinkBroken("the NIXL agent is still referenced; quarantined blocks stay so")
        self._reopen()

    def close(self) -> None:
        for peer in list(self._peers):
            self.drop_peer(peer)
        self._close_reader()
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.close()
        gc.collect()

    def _close_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def _reopen(self) -> None:
        self._open_reader()
        for worker_id, peer in list(self._peers.items()):
            try:
                self._attach(peer)
            except TransferError as error:
                logger.warning("%s is not connected any more: %s", worker_id, str(error))
                self.drop_peer(worker_id)

    def _attach(self, peer: NixlPeer) -> None:
        """Raises IncompatiblePeer when the agent does not take the peer, PeerGone for now."""
        endpoint, region = peer.endpoint, self._region
        if self._reader is None:
            raise PeerGone(f"{peer.worker_id}: the NIXL agent here is being rebuilt")
        failure = ""
        try:
            peer.agent_name = self._reader.core.add_remote_agent(endpoint.agent_blob)
            self._attached[peer.agent_name] += 1
            peer.remote = self._describe(
                peer.agent_name.decode(),
                peer.plan.remote,
                (endpoint.pool_address, endpoint.device_id, endpoint.memory_type),
            )
            here = (region.address, region.device_id or 0, self._memory_type)
            peer.local = self._describe("", peer.plan.local, here)
        except self._errors as error:
            failure = type(error).__name__
        if failure:
            self._detach(peer)
            raise IncompatiblePeer(
                f"NIXL does not accept the agent of {peer.worker_id} ({failure})"
            )

    def _detach(self, peer: NixlPeer) -> None:
        lists, peer.remote, peer.local = (peer.remote, peer.local), None, None
        for prepared in lists:
            if prepared is not None:
                prepared.release()
        name, peer.agent_name = peer.agent_name, b""
        self._attached[name] -= 1
        if not name or self._attached[name] or self._reader is None:
            return
        try:
            self._reader.core.remove_remote_agent(name.decode())
        except self._errors as error:
            logger.debug("removing agent failed: %s", type(error).__name__)

    def _describe(self, agent_name: str, side: SidePlan, memory: tuple[int, int, str]) -> Any:
        """One strided row stands for one piece of every block: see `descriptor_ids`."""
        address, device, memory_type = memory
        rows = np.empty((side.offsets.size, 5), dtype=np.uint64)
        rows[:, 0] = side.offsets.ravel() + address
        rows[:, 1:] = (side.piece_bytes, device, side.block_bytes, side.num_blocks)
        assert self._reader is not None
        return self._reader.core.prep_xfer_dlist(agent_name, rows, memory_type)

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        return errors_of(self._api)


def check_readable(card: PeerCard, endpoint: NixlEndpoint) -> None:
    """Read the peer's canary as UCX would. Raises PeerGone or IncompatiblePeer (reason and fix)."""
    try:
        content = read_memory(card.pid, endpoint.canary_address, CANARY_BYTES)
    except ProcessLookupError:
        raise PeerGone(f"{card.worker_id}: its process has ended") from None
    except PermissionError:
        if endpoint.memory_type == GPU_MEMORY:
            # UCX maps it by a handle, for which no such right is needed.
            return
        raise IncompatiblePeer(
            f"memory of {card.worker_id} may not be read (process_vm_readv: EPERM); set the KV "
            "transport to shm, or run both workers as one user with kernel.yama.ptrace_scope "
            "below 2 and, in containers, with the capability SYS_PTRACE"
        ) from None
    except OSError as error:
        raise PeerGone(f"{card.worker_id}: its memory is gone ({error.strerror})") from None
    if content != endpoint.canary:
        raise PeerGone(f"process {card.pid} is not {card.worker_id} any more")
