"""The transport of another rank, as rank 0 sees it. Implements `Transport`.

The rank answers every call once, a given-up one too (`rank_server`). Blocks of a read that was
given up here are named by the rank when they are safe; if the rank had ended the read before it
heard of it, they are named from here. A rank whose stream has ended writes nothing any more.

Not known here: processes, other ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from baton.core.block import BlockId
from baton.core.errors import PeerGone, TransferError, TransferTimeout
from baton.core.fabric import LinkReport
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.metadata import CARD_LIFETIME_S, seal_card
from kvtransfer.rank_messages import (
    Call,
    Cancel,
    CardChanged,
    CloseRank,
    Connected,
    ConnectRank,
    DisconnectRank,
    Ended,
    MeasureRank,
    Opened,
    ReadBlocks,
    Recycled,
    Request,
    Settled,
    read_message,
    write_message,
)
from kvtransfer.transport import ReadStats, UnitIds, UnitsPerBlock

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0
"""Connecting tries one link after another, each within a bound of its own."""
CLOSE_TIMEOUT_S = 20.0
ANSWER_GRACE_S = 2.0
"""Beyond the time that a read or a measurement has, for a rank on a busy machine."""
Answer = Connected | LinkReport | ReadStats | None


@dataclass(slots=True, eq=False)
class _Call:
    future: asyncio.Future[Answer]
    block_ids: tuple[BlockId, ...]
    """What a read writes to, each once."""
    is_given_up: bool = False


class RankProxy:
    """All methods are called on one event loop's thread."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        opened: Opened,
        *,
        rank: int,
        secret: bytes,
        wall_clock: Callable[[], float],
    ) -> None:
        """See `open`."""
        self._writer = writer
        self._card = opened.card
        self._name = opened.name
        self._rank = rank
        self._secret = secret
        self._wall_clock = wall_clock
        self.num_recycles = 0
        """How often the rank had to rebuild a link."""
        self._ids = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self._peers: dict[WorkerId, Connected] = {}
        self._held: Counter[BlockId] = Counter()
        """Of given-up reads, until the rank names them; negative when it did so before."""
        self._settled: list[BlockId] = []
        self._is_lost = False
        self._is_closed = False
        self._listening = asyncio.create_task(self._listen(reader))

    @classmethod
    async def open(
        cls,
        connection: socket.socket,
        *,
        rank: int,
        secret: bytes,
        timeout_s: float,
        wall_clock: Callable[[], float] = time.time,
    ) -> RankProxy:
        """Takes the socket to the rank's `serve_rank`. Raises TransferError."""
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        try:
            opened = await asyncio.wait_for(read_message(reader), timeout_s)
            if not isinstance(opened, Opened):
                raise TransferError(f"rank {rank} of this worker has no KV transport")
        except BaseException as error:
            await _hang_up(writer)
            if isinstance(error, TimeoutError):
                raise TransferTimeout(
                    f"rank {rank} of this worker has opened no KV transport in {timeout_s:g} s"
                ) from None
            raise
        return cls(reader, writer, opened, rank=rank, secret=secret, wall_clock=wall_clock)

    @property
    def name(self) -> str:
        return self._name

    def card(self, nonce: bytes) -> bytes:
        now_s = self._wall_clock()
        card = replace(
            self._card, nonce=nonce, issued_at_s=now_s, expires_at_s=now_s + CARD_LIFETIME_S
        )
        return seal_card(card, self._secret)

    async def connect(self, card: bytes, *, nonce: bytes) -> tuple[WorkerId, Epoch]:
        answer = await self._ask(ConnectRank(card, nonce), CALL_TIMEOUT_S)
        assert isinstance(answer, Connected)
        self._peers[answer.peer] = answer
        return answer.peer, answer.epoch

    def link(self, peer: WorkerId) -> LinkReport | None:
        known = self._peers.get(peer)
        return known.link if known is not None else None

    def units_per_block(self, peer: WorkerId) -> UnitsPerBlock:
        return self._known(peer).units_per_block

    def num_layers(self, peer: WorkerId) -> int:
        return self._known(peer).num_layers

    async def measure(self, peer: WorkerId, *, num_rounds: int, timeout_s: float) -> LinkReport:
        self._known(peer)
        request = MeasureRank(peer, num_rounds, timeout_s)
        # Of each read: one to begin with, then so many of one unit and as many of all.
        limit_s = (2 * num_rounds + 1) * timeout_s
        answer = await self._ask(request, limit_s + ANSWER_GRACE_S)
        assert isinstance(answer, LinkReport)
        if peer in self._peers:
            self._peers[peer] = self._peers[peer]._replace(link=answer)
        return answer

    async def read(
        self,
        peer: WorkerId,
        remote: UnitIds,
        local: UnitIds,
        *,
        timeout_s: float,
        layers: range | None = None,
    ) -> ReadStats:
        units_per_block = self.units_per_block(peer).local
        local_units = np.asarray(local, dtype=np.int64)
        remote_units = np.asarray(remote, dtype=np.int64)
        request = ReadBlocks(peer, remote_units, local_units, timeout_s, layers)
        block_ids = tuple(map(BlockId, np.unique(local_units // units_per_block).tolist()))
        answer = await self._ask(request, timeout_s + ANSWER_GRACE_S, block_ids)
        assert isinstance(answer, ReadStats)
        return answer

    def settled(self) -> list[BlockId]:
        settled, self._settled = self._settled, []
        return settled

    async def disconnect(self, peer: WorkerId) -> None:
        self._peers.pop(peer, None)
        await self._ask(DisconnectRank(peer), CALL_TIMEOUT_S)

    async def close(self) -> None:
        """Raises TransferTimeout when the rank does not answer; it is hung up on all the same."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            with contextlib.suppress(PeerGone):
                await self._call(CloseRank(), CLOSE_TIMEOUT_S)
        finally:
            self._listening.cancel()
            self._lose()
            await _hang_up(self._writer)

    def _known(self, peer: WorkerId) -> Connected:
        if self._is_closed:
            raise TransferError("the transport is closed")
        known = self._peers.get(peer)
        if known is None:
            raise PeerGone(f"{peer} is not connected")
        return known

    async def _ask(
        self, request: Request, timeout_s: float, block_ids: tuple[BlockId, ...] = ()
    ) -> Answer:
        if self._is_closed:
            raise TransferError("the transport is closed")
        return await self._call(request, timeout_s, block_ids)

    async def _call(
        self, request: Request, timeout_s: float, block_ids: tuple[BlockId, ...] = ()
    ) -> Answer:
        if self._is_lost:
            raise PeerGone(self._loss)
        call_id = next(self._ids)
        call = _Call(asyncio.get_running_loop().create_future(), block_ids)
        self._calls[call_id] = call
        write_message(self._writer, Call(call_id, request))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(call.future)
        except TimeoutError:
            self._give_up(call_id, call)
            raise TransferTimeout(
                f"rank {self._rank} of this worker does not answer within {timeout_s:g} s"
            ) from None
        except asyncio.CancelledError:
            self._give_up(call_id, call)
            raise

    def _give_up(self, call_id: int, call: _Call) -> None:
        if not call.future.done():
            call.is_given_up = True
            self._hold(call.block_ids)
            write_message(self._writer, Cancel(call_id))
        elif call.future.cancelled() or not isinstance(call.future.exception(), TransferTimeout):
            # It was over in the instant in which the caller gave it up.
            self._settled += call.block_ids

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while (message := await read_message(reader)) is not None:
                match message:
                    case Ended():
                        self._ended(message)
                    case Settled(block_ids):
                        self._release(block_ids)
                    case CardChanged(card):
                        self._card = card
                    case Recycled(num_recycles):
                        self.num_recycles = num_recycles
                    case _:
                        pass
        except Exception:
            logger.exception("rank %d of this worker is not understood", self._rank)
        finally:
            self._lose()

    def _ended(self, ended: Ended) -> None:
        call = self._calls.pop(ended.call_id, None)
        if call is None:
            return
        error = ended.failure.error() if ended.failure is not None else None
        is_held = isinstance(error, TransferTimeout)
        if call.is_given_up:
            if not is_held:
                self._release(call.block_ids)
            return
        if is_held:
            self._hold(call.block_ids)
        if error is not None:
            call.future.set_exception(error)
        else:
            call.future.set_result(ended.result)

    def _hold(self, block_ids: Iterable[BlockId], count: int = 1) -> None:
        for block_id in block_ids:
            self._held[block_id] += count
            if not self._held[block_id]:
                del self._held[block_id]

    def _release(self, block_ids: Sequence[BlockId]) -> None:
        self._hold(block_ids, -1)
        self._settled += block_ids

    def _lose(self) -> None:
        """The rank has gone, or is not listened to any more: it writes nothing."""
        self._is_lost = True
        self._settled += self._held.elements()
        self._held.clear()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.is_given_up and not call.future.done():
                call.future.set_exception(PeerGone(self._loss))
                # Nobody may be left to be told.
                call.future.exception()

    @property
    def _loss(self) -> str:
        return f"rank {self._rank} of this worker is lost"


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
