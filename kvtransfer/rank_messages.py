"""What the transport of rank 0 and that of another rank tell each other, over one socket pair.

    rank 0 ──► Call(id, request), Cancel(id)
           ◄── Opened, once and first;  Ended(id), once per call
           ◄── Settled, CardChanged, Recycled at any time

Values are pickled behind their length: both ends are processes of one worker, and the socket has
no name.
"""

from __future__ import annotations

import asyncio
import pickle
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.core.block import BlockId
from baton.core.errors import (
    BadPeerCard,
    IncompatiblePeer,
    LeaseLost,
    PeerGone,
    TransferError,
    TransferTimeout,
)
from baton.core.fabric import LinkReport
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.metadata import PeerCard
from kvtransfer.transport import ReadStats, UnitsPerBlock

_LENGTH = struct.Struct(">I")
_KINDS: dict[str, type[TransferError]] = {
    kind.__name__: kind
    for kind in (
        TransferError,
        BadPeerCard,
        IncompatiblePeer,
        LeaseLost,
        PeerGone,
        TransferTimeout,
    )
}


@dataclass(frozen=True, slots=True)
class ConnectRank:
    """A rank's card, not a group's."""

    card: bytes
    nonce: bytes


@dataclass(frozen=True, slots=True)
class MeasureRank:
    peer: WorkerId
    num_rounds: int
    timeout_s: float


@dataclass(frozen=True, slots=True, eq=False)
class ReadBlocks:
    peer: WorkerId
    remote: NDArray[np.int64]
    """Unchecked units."""
    local: NDArray[np.int64]
    timeout_s: float
    layers: range | None = None


@dataclass(frozen=True, slots=True)
class DisconnectRank:
    peer: WorkerId


@dataclass(frozen=True, slots=True)
class CloseRank:
    """The last call."""


Request = ConnectRank | MeasureRank | ReadBlocks | DisconnectRank | CloseRank


@dataclass(frozen=True, slots=True)
class Call:
    call_id: int
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give up a call; its `Ended` comes all the same."""

    call_id: int


class Connected(NamedTuple):
    peer: WorkerId
    epoch: Epoch
    link: LinkReport | None
    units_per_block: UnitsPerBlock
    num_layers: int
    """See `Transport.num_layers`."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A TransferError on its way between two processes."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Of what is no TransferError the kind alone: its text may hold paths."""
        for kind in type(error).__mro__:
            if kind.__name__ in _KINDS and issubclass(kind, TransferError):
                return cls(kind.__name__, str(error))
        return cls(TransferError.__name__, f"{type(error).__name__}; the worker's log has more")

    def error(self) -> TransferError:
        return _KINDS[self.kind](self.message)


@dataclass(frozen=True, slots=True)
class Ended:
    """A cancelled read that had not ended by itself has failed with TransferTimeout."""

    call_id: int
    result: Connected | LinkReport | ReadStats | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    name: str
    """Of the transport."""
    card: PeerCard


@dataclass(frozen=True, slots=True)
class CardChanged:
    """Peers that connect from now on need this one."""

    card: PeerCard


@dataclass(frozen=True, slots=True)
class Settled:
    """See `Transport.settled`."""

    block_ids: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class Recycled:
    num_recycles: int
    """Since the start of the rank."""


Message = Call | Cancel | Ended | Opened | CardChanged | Settled | Recycled


def write_message(writer: asyncio.StreamWriter, message: Message) -> None:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    writer.write(_LENGTH.pack(len(data)) + data)


async def read_message(reader: asyncio.StreamReader) -> Message | None:
    """None at the end of the stream."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        message: Message = pickle.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return message
