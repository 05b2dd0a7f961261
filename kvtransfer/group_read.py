"""One read of a group of ranks: its parts, and when its blocks are safe after it was given up.

    parts   one per rank and owner's rank it reads from; all move into the same block ids
    read    over when all parts are over; the first failure ends the others

A part that was given up may still write: its transport names each block once when it cannot any
more. So a block of a given-up read is settled when every such part has named it. The two may come
in either order: a part can name its blocks before the others have ended.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from baton.core.block import BlockId
from baton.core.errors import PeerGone, TransferError, TransferTimeout
from kvtransfer.transport import ReadStats


class GroupQuarantine:
    """Blocks of given-up group reads, until no part can write to them. No threads, no clock."""

    def __init__(self) -> None:
        self._due: Counter[BlockId] = Counter()
        """Reports that are still to come; negative when they came before `given_up`."""
        self._waiting: Counter[BlockId] = Counter()
        """Reads that wait for the block."""

    def given_up(self, block_ids: Iterable[BlockId], num_parts: int) -> None:
        """A read is over; each of `num_parts` of its parts names each of these blocks once."""
        for block_id in block_ids:
            self._due[block_id] += num_parts
            self._waiting[block_id] += 1

    def reported(self, block_ids: Iterable[BlockId]) -> None:
        """A part named these."""
        self._due.subtract(block_ids)

    def settled(self) -> list[BlockId]:
        """Blocks that are safe now, each once per given-up read."""
        safe = [block_id for block_id in self._waiting if not self._due[block_id]]
        found = [block_id for block_id in safe for _ in range(self._waiting.pop(block_id))]
        for block_id in safe:
            del self._due[block_id]
        return found

    @property
    def is_empty(self) -> bool:
        return not self._waiting and not +self._due and not -self._due


@dataclass(slots=True, eq=False)
class _Part:
    run: Callable[[], Awaitable[ReadStats]]
    is_started: bool = False

    async def read(self) -> ReadStats:
        self.is_started = True
        return await self.run()


class GroupRead:
    """Starts its parts at construction, on the running loop; then to be awaited by `result`."""

    def __init__(
        self,
        parts: Sequence[Callable[[], Awaitable[ReadStats]]],
        *,
        block_ids: Callable[[], Iterable[BlockId]],
        quarantine: GroupQuarantine,
        on_over: Callable[[GroupRead], None],
    ) -> None:
        """`block_ids`: of the local pool, each once; asked for when they are given up. `on_over` is
        called when no part runs."""
        self._block_ids = block_ids
        self._quarantine = quarantine
        self._on_over = on_over
        self._is_cancelled = False
        self._is_given_up = False
        self._future: asyncio.Future[ReadStats] = asyncio.get_running_loop().create_future()
        self._parts = {asyncio.ensure_future(part.read()): part for part in map(_Part, parts)}
        for task in self._parts:
            task.add_done_callback(self._part_ended)

    async def result(self) -> ReadStats:
        """Raises as `Transport.read`."""
        try:
            return await asyncio.shield(self._future)
        except asyncio.CancelledError:
            self._is_cancelled = True
            if self._future.done():
                # It was over in the instant in which the caller gave it up.
                self._quarantine_blocks(0)
            self._cancel_parts()
            raise

    def _cancel_parts(self) -> None:
        for task in self._parts:
            task.cancel()

    def _part_ended(self, task: asyncio.Task[ReadStats]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._cancel_parts()
        if all(task.done() for task in self._parts) and not self._future.done():
            self._conclude()

    def _conclude(self) -> None:
        num_given_up = sum(_is_given_up(task, part) for task, part in self._parts.items())
        if num_given_up or self._is_cancelled:
            self._quarantine_blocks(num_given_up)
        errors = [e for task in self._parts if (e := _error_of(task)) is not None]
        if self._is_cancelled:
            self._future.cancel()
        elif errors:
            self._future.set_exception(_group_error(errors, is_given_up=num_given_up > 0))
        else:
            stats = [task.result() for task in self._parts]
            self._future.set_result(
                ReadStats(
                    sum(s.num_bytes for s in stats),
                    sum(s.num_descriptors for s in stats),
                    max(s.seconds for s in stats),
                )
            )
        self._on_over(self)

    def _quarantine_blocks(self, num_parts: int) -> None:
        if not self._is_given_up:
            self._is_given_up = True
            self._quarantine.given_up(self._block_ids(), num_parts)


def _is_given_up(task: asyncio.Task[ReadStats], part: _Part) -> bool:
    if task.cancelled():
        # A task that never ran has asked nobody for anything.
        return part.is_started
    return isinstance(task.exception(), TransferTimeout)


def _error_of(task: asyncio.Task[ReadStats]) -> BaseException | None:
    return None if task.cancelled() else task.exception()


def _group_error(errors: Sequence[BaseException], *, is_given_up: bool) -> BaseException:
    """What says most: a part that was ended because of another one has no error of its own."""
    for error in errors:
        if not isinstance(error, TransferError):
            return error
    if is_given_up:
        return TransferTimeout(str(errors[0]))
    return next((error for error in errors if isinstance(error, PeerGone)), errors[0])
