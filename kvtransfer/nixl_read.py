"""One read of a NIXL agent, and the peer it is of.

A transfer handle has neither cancel nor time-out, and its failure says little: that of a dead
process is over, that of a living one may still land. What was posted is therefore kept together
with the peer it is of, until it is over or its agent is destroyed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from baton.core.errors import PeerGone
from baton.core.worker_info import WorkerId
from kvtransfer.link import LinkBroken
from kvtransfer.metadata import NixlEndpoint
from kvtransfer.peer_process import PeerProcess
from kvtransfer.plan import BlockIds, PairPlan, SidePlan

logger = logging.getLogger(__name__)

DEATH_CONFIRMED_S = 0.5
"""How long the first failure of a read waits for the kernel to report the peer's exit."""


@dataclass(slots=True, eq=False)
class NixlPeer:
    """Its process stays watched until the last of its transfers is released."""

    worker_id: WorkerId
    endpoint: NixlEndpoint
    plan: PairPlan
    process: PeerProcess
    agent_name: bytes = b""
    remote: Any = None
    """Prepared descriptor list, one descriptor per piece of the peer's pool (see `_describe`)."""
    local: Any = None
    """Likewise, of our pool."""
    num_posted: int = 0
    is_dropped: bool = False

    def close(self) -> None:
        self.process.close()


class NixlRead:
    """One transfer handle. The only object that keeps it, so that a recycle can let it go."""

    def __init__(self, agent: Any, peer: NixlPeer, retire: Callable[[NixlPeer], None]) -> None:
        """`retire` is called with the peer when this transfer is over."""
        self._agent = agent
        self._peer = peer
        self._retire = retire
        self._handle: Any = None
        self._failure = ""
        self.is_complete = False
        peer.num_posted += 1

    @property
    def has_failed(self) -> bool:
        return bool(self._failure)

    def start(self, local: BlockIds, remote: BlockIds) -> None:
        peer = self._peer
        try:
            self._handle = self._agent.make_prepped_xfer(
                "READ",
                peer.local,
                descriptor_ids(peer.plan.local, local),
                peer.remote,
                descriptor_ids(peer.plan.remote, remote),
                b"",
            )
            self.is_complete = self._agent.transfer(self._handle) == "DONE"
        except Exception as error:
            # The name only: the exception's frames would keep the agent alive past a recycle.
            self._failure = type(error).__name__

    def is_done(self) -> bool:
        """A failed read of a dead process is over; one of a living process may still land."""
        who, process = self._peer.worker_id, self._peer.process
        is_new = not self._failure
        if is_new:
            self._ask()
        if self._failure:
            # A read fails a little before the kernel reports the peer's exit.
            if process.is_dead(wait_s=DEATH_CONFIRMED_S if is_new else 0.0):
                raise PeerGone(f"{who}: its process has ended")
            raise LinkBroken(f"NIXL failed with {self._failure} while {who} lives")
        return self.is_complete

    def _ask(self) -> None:
        if self._handle is None:
            self._failure = "no handle"
            return
        try:
            state = self._agent.check_xfer_state(self._handle)
        except Exception as error:
            self._failure = type(error).__name__
        else:
            self._failure = state if state == "ERR" else ""
            self.is_complete = state == "DONE"

    def cancel(self) -> bool:
        """NIXL knows none: what was released, and even detached, has been seen to land."""
        return False

    def release(self) -> None:
        if self._agent is None:
            return
        handle, self._handle, self._agent = self._handle, None, None
        if handle is not None:
            try:
                handle.release()
            except Exception as error:
                logger.debug("releasing a transfer failed: %s", type(error).__name__)
        self._peer.num_posted -= 1
        self._retire(self._peer)


def descriptor_ids(side: SidePlan, units: BlockIds) -> BlockIds:
    """Descriptors of these units, piece by piece: row (part, piece) has one for every block."""
    if side.offsets.size == 1:
        return units
    blocks, parts = np.divmod(units, side.units_per_block)
    num_pieces = side.offsets.shape[1]
    rows = parts[:, None] * num_pieces + np.arange(num_pieces, dtype=np.int32)
    ids: BlockIds = (rows * side.num_blocks + blocks[:, None]).ravel()
    return ids
