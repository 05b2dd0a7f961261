"""A LeaseOwner under a manual clock, and short spellings of its events and effects."""

from __future__ import annotations

from typing import Any, TypeVar

from baton.core.block import BlockHash, BlockId
from baton.core.clock import ManualClock
from baton.core.request import RequestId, TokenDelta
from baton.core.worker_info import Epoch
from kvtransfer.messages import (
    ChunkReady,
    Completed,
    FetchPrefix,
    LayersReady,
    LeaseId,
    Refused,
    Takeover,
)
from kvtransfer.owner import LeaseOwner, OwnerEffect, OwnerLimits, ReaderId, ReleaseLease, Send

EPOCH = Epoch("e1")
READER = ReaderId("decode-0@d1")
OTHER = ReaderId("decode-1@d1")
R = RequestId("r")
FIRST = TokenDelta(R, token_ids=[5])
FILL = 3
HASHES = tuple(BlockHash(bytes([i]) * 16) for i in range(4))

E = TypeVar("E")


class Harness:
    """An owner, its clock, and short spellings of its events."""

    def __init__(self, **limits: float) -> None:
        self.clock = ManualClock(50.0)
        values: dict[str, Any] = {"lease_s": 10.0, "watch_s": 60.0, "ended_s": 90.0, **limits}
        self.owner = LeaseOwner(epoch=EPOCH, clock=self.clock, limits=OwnerLimits(**values))

    def chunk(
        self,
        first: int,
        count: int,
        *,
        is_last: bool = False,
        request_id: RequestId = R,
        fill_id: int = 0,
    ) -> list[OwnerEffect]:
        return self.owner.chunk_done(
            request_id,
            first_block_index=first,
            block_ids=[BlockId(100 + first + i) for i in range(count)],
            is_last=is_last,
            first_token=FIRST if is_last else None,
            fill_id=fill_id,
        )

    def layers(self, first: int, count: int, num_layers: int = 1) -> list[OwnerEffect]:
        ids = tuple(BlockId(100 + first + i) for i in range(count))
        return self.owner.layers_done(R, LayersReady(R, FILL, first, ids, num_layers))

    def lease_id(self) -> LeaseId:
        """Of the only request, through a repeated watch."""
        return chunks(self.owner.watch(R, READER))[0].lease_id

    def take_over(
        self, *, reader: ReaderId = READER, num_known_tokens: int = 3
    ) -> list[OwnerEffect]:
        return self.owner.receive(reader, Takeover(R, num_known_tokens))

    def fetch(self, *, reader: ReaderId = READER, request_id: RequestId = R) -> list[OwnerEffect]:
        return self.owner.receive(reader, FetchPrefix(request_id, HASHES))

    def finish(self) -> None:
        self.owner.check_integrity()
        assert self.owner.is_empty


def chunks(effects: list[OwnerEffect]) -> list[ChunkReady]:
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, ChunkReady)]


def refusals(effects: list[OwnerEffect]) -> list[Refused]:
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Refused)]


def verdicts(effects: list[OwnerEffect]) -> list[bool]:
    return [
        e.message.valid for e in effects if isinstance(e, Send) and isinstance(e.message, Completed)
    ]


def releases(effects: list[OwnerEffect]) -> list[RequestId]:
    return [e.request_id for e in effects if isinstance(e, ReleaseLease)]


def only(effects: list[OwnerEffect], kind: type[E]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]
