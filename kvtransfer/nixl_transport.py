"""Reading blocks with NIXL (UCX). The only file that imports it.

What shapes this file, all measured with NIXL 1.5.1:

* No cancel and no time-out: deadlines and quarantine are the mover's; `recycle` destroys the agent,
  which alone stops what is in flight, and only once no object of it is referenced any more.
* On host memory UCX reads by process_vm_readv (CMA), inside the posting call. Where that is not
  permitted UCX would emulate reads over TCP, and such a read can kill the process it reads from.
  Hence two guards: UCX may not emulate, and a peer whose canary we cannot read is refused.
* The Python API starts a spinning progress thread; the delay below lets it sleep.
* Adjacent descriptors with adjacent ids are merged by NIXL, strided lists make preparing free.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import logging
import os
import secrets
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from baton.core.errors import IncompatiblePeer, PeerGone, TransferError
from baton.core.worker_info import WorkerId
from kvtransfer.link import LinkBroken, Posted
from kvtransfer.metadata import CANARY_BYTES, NixlEndpoint, PeerCard, PeerIdentity
from kvtransfer.mover import MoverLimits
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.peer_process import PeerProcess, allow_reads_by_siblings, read_memory
from kvtransfer.plan import BlockIds
from kvtransfer.transport import PoolRegion

logger = logging.getLogger(__name__)

NAME = "nixl"
PROGRESS_DELAY_US = 1000
"""Pause of UCX's progress thread. 0 spins on a core; reads of host memory do not wait for it."""
DEATH_CONFIRMED_S = 0.5
"""A read fails a little before the kernel reports the peer's exit."""
_MODULES = ("nixl_cu13._api", "nixl._api")
_UCX_DEFAULTS = {
    # Bookkeeping traffic only; UCX would open a listener on every interface.
    "UCX_NET_DEVICES": "lo",
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


@dataclass(slots=True, eq=False)
class _Peer:
    card: PeerCard
    endpoint: NixlEndpoint
    process: PeerProcess
    agent_name: bytes = b""
    blocks: Any = None
    """Prepared descriptor list: one descriptor per block of the peer's pool."""


class NixlLink:
    """One agent over the local pool. Everything but the constructor runs on the mover's thread."""

    name = NAME

    def __init__(self, region: PoolRegion, identity: PeerIdentity) -> None:
        self._region = region
        self._identity = identity
        self._memory_type = "DRAM" if region.device_id is None else "VRAM"
        self._canary = ctypes.create_string_buffer(secrets.token_bytes(CANARY_BYTES), CANARY_BYTES)
        self._peers: dict[WorkerId, _Peer] = {}
        self._generation = 0
        self._api: Any = None
        self._agent: Any = None
        self._blocks: Any = None
        self._registered: Any = None
        self._condemned: list[weakref.ref[Any]] = []
        self._endpoint: NixlEndpoint | None = None

    @property
    def endpoint(self) -> NixlEndpoint | None:
        return self._endpoint

    @property
    def canary(self) -> tuple[int, bytes]:
        return ctypes.addressof(self._canary), self._canary.raw

    def open(self) -> None:
        """Raises TransferError when no agent can be made on this machine."""
        allow_reads_by_siblings()
        self._api = self._api or _load()
        self._generation += 1
        region = self._region
        name = f"{self._identity.worker_id}:{self._identity.epoch}:{self._generation}"
        try:
            self._agent = _make_agent(self._api, name)
            device = region.device_id or 0
            self._registered = self._agent.register_memory(
                [(region.address, region.num_bytes, device, "")], self._memory_type
            )
            self._blocks = self._describe("", region.address, device, region.num_blocks)
            blob = self._agent.get_agent_metadata()
        except self._api.nixlBind.nixlBackendError as error:
            kind = type(error).__name__
            raise TransferError(
                f"no NIXL agent here ({kind}); set the KV transport to shm"
            ) from None
        self._endpoint = NixlEndpoint(name, blob, region.address, device)

    def check_peer(self, card: PeerCard) -> None:
        check_readable(card)

    def add_peer(self, card: PeerCard) -> None:
        endpoint = card.endpoint
        if not isinstance(endpoint, NixlEndpoint):
            raise IncompatiblePeer(f"card of {card.worker_id} names no NIXL agent")
        process = PeerProcess(card.pid)
        peer = _Peer(card, endpoint, process)
        try:
            # Once more: now the process is held, it cannot be exchanged under us.
            check_readable(card)
            self._attach(peer)
        except BaseException:
            process.close()
            raise
        self._peers[card.worker_id] = peer

    def is_peer_dead(self, peer: WorkerId) -> bool:
        known = self._peers.get(peer)
        return known is None or known.process.is_dead()

    def drop_peer(self, peer: WorkerId) -> None:
        known = self._peers.pop(peer, None)
        if known is not None:
            self._detach(known)
            known.process.close()

    def post(self, peer: WorkerId, remote: BlockIds, local: BlockIds) -> Posted | None:
        known = self._peers.get(peer)
        if known is None or known.process.is_dead():
            raise PeerGone(f"{peer}: its process has ended")
        posted = _NixlPosted(self._agent, known)
        failure = posted.start(self._blocks, local, remote)
        if failure:
            posted.release()
            raise _diagnose(known, failure)
        if posted.is_complete:
            posted.release()
            return None
        return posted

    def recycle(self) -> None:
        """An agent whose end is not certain stays condemned; the next call asks again."""
        if self._agent is not None:
            for peer in self._peers.values():
                self._detach(peer)
            self._condemned.append(weakref.ref(self._agent.agent))
            self._close_agent()
        gc.collect()
        self._condemned = [core for core in self._condemned if core() is not None]
        if self._condemned:
            raise LinkBroken("the NIXL agent is still referenced; quarantined blocks stay so")
        self._reopen()

    def close(self) -> None:
        for peer in list(self._peers):
            self.drop_peer(peer)
        self._close_agent()
        gc.collect()

    def _reopen(self) -> None:
        self.open()
        for worker_id, peer in list(self._peers.items()):
            try:
                self._attach(peer)
            except TransferError as error:
                logger.warning("%s is not connected any more: %s", worker_id, str(error))
                self.drop_peer(worker_id)

    def _attach(self, peer: _Peer) -> None:
        """Raises IncompatiblePeer when the agent does not take the peer."""
        endpoint = peer.endpoint
        failure = ""
        try:
            peer.agent_name = self._agent.add_remote_agent(endpoint.agent_blob)
            peer.blocks = self._describe(
                peer.agent_name.decode(),
                endpoint.pool_address,
                endpoint.device_id,
                peer.card.num_blocks,
            )
        except self._errors as error:
            failure = type(error).__name__
        if failure:
            self._detach(peer)
            raise IncompatiblePeer(
                f"NIXL does not accept the agent of {peer.card.worker_id} ({failure})"
            )

    def _detach(self, peer: _Peer) -> None:
        blocks, peer.blocks = peer.blocks, None
        if blocks is not None:
            blocks.release()
        if peer.agent_name and self._agent is not None:
            try:
                self._agent.remove_remote_agent(peer.agent_name.decode())
            except self._errors as error:
                logger.debug("removing agent failed: %s", type(error).__name__)
        peer.agent_name = b""

    def _describe(self, agent_name: str, address: int, device: int, num_blocks: int) -> Any:
        """One strided row stands for one descriptor per block."""
        size = self._region.layout.block_bytes
        row = np.array([(address, size, device, size, num_blocks)], dtype=np.uint64)
        return self._agent.prep_xfer_dlist(agent_name, row, self._memory_type)

    def _close_agent(self) -> None:
        """Lists before the registration, the registration before the agent."""
        agent, self._agent = self._agent, None
        if agent is None:
            return
        blocks, self._blocks = self._blocks, None
        if blocks is not None:
            blocks.release()
        registered, self._registered = self._registered, None
        if registered is not None:
            agent.deregister_memory(registered)
        agent.agent = None

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        return _errors_of(self._api)


class _NixlPosted:
    """One transfer handle. The only object that keeps it, so that a recycle can let it go."""

    def __init__(self, agent: Any, peer: _Peer) -> None:
        self._agent = agent
        self._peer = peer
        self._handle: Any = None
        self.is_complete = False

    def start(self, blocks: Any, local: BlockIds, remote: BlockIds) -> str:
        """Post the read; returns the name of the error, empty when there is none."""
        try:
            self._handle = self._agent.make_prepped_xfer(
                "READ", blocks, local, self._peer.blocks, remote, b""
            )
            self.is_complete = self._agent.transfer(self._handle) == "DONE"
        except Exception as error:
            return type(error).__name__
        return ""

    def is_done(self) -> bool:
        failure = ""
        if self._handle is None:
            raise LinkBroken("the transfer was released")
        try:
            state = self._agent.check_xfer_state(self._handle)
        except Exception as error:
            failure = type(error).__name__
        else:
            if state == "ERR":
                failure = state
            self.is_complete = state == "DONE"
        if failure:
            raise _diagnose(self._peer, failure)
        return self.is_complete

    def release(self) -> None:
        handle, self._handle, self._agent = self._handle, None, None
        if handle is not None:
            try:
                handle.release()
            except Exception as error:
                logger.debug("releasing a transfer failed: %s", type(error).__name__)


def nixl_transport(
    region: PoolRegion,
    identity: PeerIdentity,
    secret: bytes,
    *,
    limits: MoverLimits | None = None,
) -> MoverTransport:
    """A transport with one NIXL agent over `region`. Raises TransferError when none is made."""
    link = NixlLink(region, identity)
    return MoverTransport(link=link, region=region, identity=identity, secret=secret, limits=limits)


def check_readable(card: PeerCard) -> None:
    """Read the peer's canary as UCX would. Raises PeerGone or IncompatiblePeer (reason and fix)."""
    try:
        content = read_memory(card.pid, card.canary_address, CANARY_BYTES)
    except ProcessLookupError:
        raise PeerGone(f"{card.worker_id}: its process has ended") from None
    except PermissionError:
        raise IncompatiblePeer(
            f"memory of {card.worker_id} may not be read (process_vm_readv: EPERM); set the KV "
            "transport to shm, or run both workers as one user with kernel.yama.ptrace_scope "
            "below 2 and, in containers, with the capability SYS_PTRACE"
        ) from None
    except OSError as error:
        raise PeerGone(f"{card.worker_id}: its memory is gone ({error.strerror})") from None
    if content != card.canary:
        raise PeerGone(f"process {card.pid} is not {card.worker_id} any more")


def _diagnose(peer: _Peer, failure: str) -> TransferError:
    """A failed read of a dead process is over; one of a living process may still land."""
    who = peer.card.worker_id
    if peer.process.is_dead(wait_s=DEATH_CONFIRMED_S):
        return PeerGone(f"{who}: its process has ended")
    return LinkBroken(f"NIXL failed with {failure} while the process lives")


def _errors_of(api: Any) -> tuple[type[Exception], ...]:
    bindings = vars(api.nixlBind)
    return tuple(
        value
        for name, value in bindings.items()
        if name.startswith("nixl") and name.endswith("Error")
    )


def _load() -> Any:
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


def _make_agent(api: Any, name: str) -> Any:
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
