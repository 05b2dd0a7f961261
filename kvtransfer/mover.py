"""One thread that owns a link and moves blocks over it.

    read submitted ─► queued ─► in flight (in pieces) ─► done
                         │           │ deadline, cancel, broken link
                         ▼           ▼
                      settled   given up: pieces in flight are quarantined until the link calls
                                them terminal, or until `recycle` destroyed the link

The thread sleeps while there is nothing to move, looks at what is in flight as `pace` says, and
slowly while only quarantined pieces are. A read is cut into pieces so that cancels, deadlines and
other reads get their turn; the bytes in flight are bounded and the rest is queued.

Why quarantine: a link such as NIXL has neither cancel nor time-out. What was given up on may land
at any later time, until it is reported terminal or the link is destroyed.

Knows no cards, no asyncio and no kind of link (`link` has the interface).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

from baton.core.block import BlockId
from baton.core.clock import Clock, MonotonicClock
from baton.core.errors import PeerGone, TransferError, TransferTimeout
from baton.core.worker_info import WorkerId
from kvtransfer.block_read import BlockRead, MoverCounters, MoverLimits, Piece
from kvtransfer.link import ConnectionLost, Link, LinkBroken
from kvtransfer.pace import Pace
from kvtransfer.peer_process import sharpen_timers
from kvtransfer.plan import BlockIds, count_runs
from kvtransfer.transport import ReadStats

logger = logging.getLogger(__name__)
T = TypeVar("T")

QUARANTINE_POLL_S = 0.01


class Mover:
    """Reads blocks over one link. Methods may be called from any thread unless marked `_`."""

    def __init__(
        self,
        link: Link,
        *,
        pool_bytes: int,
        limits: MoverLimits,
        name: str,
        clock: Clock | None = None,
    ) -> None:
        self._link = link
        self._clock = clock or MonotonicClock()
        self._limits = limits
        self._max_quarantined_bytes = int(pool_bytes * limits.max_quarantined_ratio)
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._queued: deque[BlockRead] = deque()
        self._pieces: list[Piece] = []
        self._settled: SimpleQueue[BlockId] = SimpleQueue()
        self._is_broken = False
        self._recycles: list[Future[None]] = []
        self._no_recycle_before_s = 0.0
        self._has_moved = False
        self._pace = Pace(limits.min_poll_s)
        self._is_stopping = False
        self.counters = MoverCounters()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, *, timeout_s: float) -> None:
        """Open the link on the mover's thread. Raises what opening raises."""
        self._thread.start()
        try:
            self.call(self._link.open).result(timeout_s)
        except BaseException:
            self._commands.put(self._finish)
            raise

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the mover's thread."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                future.set_exception(_bare(error))
            else:
                future.set_result(result)

        self._commands.put(run)
        return future

    def read(self, read: BlockRead) -> None:
        """Start a read of one block or more; its future gets stats, PeerGone or TransferTimeout."""
        read.future.set_running_or_notify_cancel()
        self._commands.put(lambda: self._queued.append(read))

    def give_up(self, read: BlockRead) -> None:
        """Stop caring for a read. All its local blocks will be reported by `settled`."""
        self._commands.put(lambda: self._abandon(read))

    def settled(self) -> list[BlockId]:
        """Local blocks of given-up reads that nothing writes to any more, each once."""
        blocks = []
        while True:
            try:
                blocks.append(self._settled.get_nowait())
            except Empty:
                return blocks

    def recycle(self) -> Future[None]:
        """Rebuild the link as soon as healthy pieces have landed; settles everything given up."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        self._commands.put(lambda: self._recycles.append(future))
        return future

    def stop(self, *, timeout_s: float) -> None:
        """Fail what is open, close the link, end the thread. Raises TransferTimeout if it hangs."""
        self._commands.put(self._finish)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TransferTimeout(f"the KV mover did not stop within {timeout_s:g} s")

    # Everything below runs on the mover's thread.

    def fail_peer(self, peer: WorkerId, error: PeerGone) -> None:
        """Nothing of the peer is written any more: its process is dead, or its connection, after
        which the next read may open another. Mover's thread only.

        Pieces in quarantine speak for themselves: they may be of an earlier process of that name.
        """
        reads = self._reads_of(peer)
        for piece in [p for p in self._pieces if p.is_healthy and p.read.peer == peer]:
            # Some may already be on the way over the next connection.
            piece.posted.cancel()
            self._land(piece)
        if not isinstance(error, ConnectionLost):
            self._link.drop_peer(peer)
        for read in reads:
            self._end(read, PeerGone(str(error)))

    def leave_peer(self, peer: WorkerId, reason: str) -> None:
        """Give up the peer's reads although it may live. Mover's thread only."""
        for read in self._reads_of(peer):
            held = self._let_go(read)
            if held:
                self._settle(read, read.blocks_of(read.local) - held)
                self._end(read, TransferTimeout(f"{peer}: {reason}; blocks are quarantined"))
            else:
                self._end(read, PeerGone(f"{peer}: {reason}"))
        self._link.drop_peer(peer)

    def _run(self) -> None:
        sharpen_timers(self._limits.min_poll_s / 10)
        while not self._is_stopping:
            self._wait()
            self.step()
        self._shut_down()

    def _finish(self) -> None:
        self._is_stopping = True

    def step(self) -> None:
        """One round without waiting. Mover's thread only."""
        self._drain_commands()
        self._expire()
        self._has_moved = self._poll_pieces()
        wants_recycle = self._wants_recycle()
        if wants_recycle:
            self._try_recycle()
        self._has_moved |= self._post_next(spares_recycled=wants_recycle)

    def poll_s(self) -> float:
        """Between two looks at the pieces in flight, see `pace`. Mover's thread only."""
        healthy = [p for p in self._pieces if p.is_healthy]
        oldest_at_s = healthy[0].posted_at_s if healthy else 0.0
        return self._pace.pause_s(
            healthy[0].num_bytes if healthy else 0,
            oldest_at_s,
            max((p.posted_at_s for p in healthy), default=0.0),
            self._clock.now(),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError when reads and pieces disagree. Mover's thread only."""
        in_flight = Counter(piece.read for piece in self._pieces)
        for piece in self._pieces:
            assert piece.read.is_over != piece.is_healthy
        for read in in_flight.keys() | set(self._queued):
            assert read.num_in_flight == in_flight[read]
        for read in self._queued:
            assert not read.is_over and read.num_posted < len(read.local)
        limit = self._limits.max_bytes_in_flight + self._limits.max_piece_bytes
        largest = max((p.num_bytes for p in self._pieces), default=0)
        assert self._bytes_in_flight() <= max(limit, largest)

    def _wait(self) -> None:
        """Until there is a command, or as long as the state allows."""
        if self._has_moved:
            # There may be more to do at once.
            return
        pause_s = self._idle_s()
        if pause_s == 0.0:
            # Others that want the interpreter get it between two looks.
            time.sleep(0)
            return
        with contextlib.suppress(Empty):
            self._commands.get(timeout=pause_s)()

    def _drain_commands(self) -> None:
        while not self._commands.empty():
            self._commands.get_nowait()()

    def _idle_s(self) -> float | None:
        if self._queued or any(p.is_healthy for p in self._pieces):
            return self.poll_s()
        return QUARANTINE_POLL_S if self._pieces or self._recycles else None

    def _bytes_in_flight(self) -> int:
        return sum(p.num_bytes for p in self._pieces if p.is_healthy)

    def _post_next(self, *, spares_recycled: bool) -> bool:
        """Post one piece of the next read whose turn it is."""
        if self._bytes_in_flight() >= self._limits.max_bytes_in_flight:
            return False
        for _ in range(len(self._queued)):
            read = self._queued.popleft()
            if spares_recycled and self._link.needs_recycle(read.peer):
                self._queued.append(read)
                continue
            self._post_piece(read)
            return True
        return False

    def _post_piece(self, read: BlockRead) -> None:
        """Of a read that was taken from the queue; goes to its end while something is left."""
        read.started_at_s = read.started_at_s or self._clock.now()
        num_units = max(1, self._limits.max_piece_bytes // read.plan.local.unit_bytes)
        part = slice(read.num_posted, read.num_posted + num_units)
        remote, local = read.remote[part], read.local[part]
        try:
            posted = self._link.post(read.peer, remote, local, by_layer=read.plan.is_by_layer)
        except TransferError as error:
            self._queued.appendleft(read)
            self._fail(read.peer, error)
            return
        except Exception as error:
            # Nobody knows what it has begun: the piece counts as moving until a recycle.
            posted = _Unknown(_named(error))
        read.num_posted += len(local)
        read.num_descriptors += _num_descriptors(read, remote, local)
        if posted is not None:
            read.num_in_flight += 1
            self._pieces.append(Piece(read, local, posted, self._clock.now()))
        if read.num_posted < len(read.local):
            self._queued.append(read)
        else:
            self._finish_if_complete(read)

    def _poll_pieces(self) -> bool:
        moved = False
        for piece in list(self._pieces):
            if piece not in self._pieces:
                continue
            try:
                if not piece.posted.is_done():
                    continue
            except Exception as error:
                failure = _named(error)
                if piece.is_healthy:
                    self._fail(piece.read.peer, failure)
                    moved = True
                    continue
                if isinstance(failure, LinkBroken):
                    continue
            if piece.is_healthy:
                self._pace.landed(piece.num_bytes, piece.posted_at_s, self._clock.now())
            self._land(piece)
            self._finish_if_complete(piece.read)
            moved = True
        return moved

    def _land(self, piece: Piece) -> None:
        """Nothing of this piece is written any more."""
        piece.posted.release()
        self._pieces.remove(piece)
        piece.read.num_in_flight -= 1
        if not piece.is_healthy:
            read = piece.read
            self._settle(read, read.blocks_of(piece.local) - self._held_blocks(read))

    def _finish_if_complete(self, read: BlockRead) -> None:
        if read.is_over or read.num_in_flight or read.num_posted < len(read.local):
            return
        seconds = self._clock.now() - read.started_at_s
        read.is_over = True
        self.counters.reads += 1
        self.counters.read_bytes += read.num_bytes
        read.future.set_result(ReadStats(read.num_bytes, read.num_descriptors, seconds))

    def _fail(self, peer: WorkerId, error: TransferError) -> None:
        if isinstance(error, PeerGone):
            self.fail_peer(peer, error)
            return
        logger.warning("link to %s failed, it will be rebuilt: %s", peer, str(error))
        self._is_broken = True
        for read in self._reads_of(peer):
            self._abandon(read, TransferTimeout(f"{peer}: {error}; blocks are quarantined"))

    def _expire(self) -> None:
        now_s = self._clock.now()
        for read in [r for r in self._open_reads() if r.deadline_s <= now_s]:
            late = f"read of {read.num_bytes} bytes from {read.peer} passed its deadline"
            self._abandon(read, TransferTimeout(late))

    def _abandon(self, read: BlockRead, error: TransferError | None = None) -> None:
        """Give up: what cannot be cancelled goes to quarantine, everything else is settled now."""
        if read.is_over:
            if error is None and read.future.done() and not _is_given_up(read.future):
                # Cancelled in the instant in which it had ended.
                self._settle(read, read.blocks_of(read.local))
            return
        held = self._let_go(read)
        self._settle(read, read.blocks_of(read.local) - held)
        if error is None:
            self._end(read, TransferTimeout("the caller gave up"), is_failure=False)
        else:
            self._end(read, error)

    def _let_go(self, read: BlockRead) -> set[int]:
        """Cancel the pieces of a read; returns the blocks that may still be written to."""
        now_s = self._clock.now()
        for piece in [p for p in self._pieces if p.read is read]:
            if piece.posted.cancel():
                self._land(piece)
            else:
                piece.given_up_at_s = now_s
        return self._held_blocks(read)

    def _held_blocks(self, read: BlockRead) -> set[int]:
        """Blocks that pieces of the read in flight may write to."""
        held: set[int] = set()
        for piece in self._pieces:
            if piece.read is read:
                held |= read.blocks_of(piece.local)
        return held

    def _end(self, read: BlockRead, error: TransferError, *, is_failure: bool = True) -> None:
        read.is_over = True
        if read in self._queued:
            self._queued.remove(read)
        self.counters.failed_reads += is_failure
        read.future.set_exception(_bare(error))

    def _settle(self, read: BlockRead, block_ids: set[int]) -> None:
        if not read.is_scratch:
            for block_id in sorted(block_ids):
                self._settled.put(BlockId(block_id))

    def _wants_recycle(self) -> bool:
        if self._recycles:
            return True
        now_s = self._clock.now()
        if now_s < self._no_recycle_before_s:
            return False
        held = [p for p in self._pieces if not p.is_healthy]
        ages = [now_s - p.given_up_at_s for p in held if p.given_up_at_s is not None]
        return (
            self._is_broken
            or sum(p.num_bytes for p in held) > self._max_quarantined_bytes
            or max(ages, default=0.0) > self._limits.max_quarantine_s
        )

    def _try_recycle(self) -> None:
        """Healthy pieces that it would break land first or pass their deadline."""
        if any(p.is_healthy and self._link.needs_recycle(p.read.peer) for p in self._pieces):
            return
        self._no_recycle_before_s = self._clock.now() + self._limits.recycle_pause_s
        waiting, self._recycles = self._recycles, []
        held = [p for p in self._pieces if not p.is_healthy]
        for piece in held:
            piece.posted.release()
        try:
            self._link.recycle()
        except Exception as error:
            # The text only: a kept exception keeps frames, and with them the link's objects.
            logger.error("KV link could not be rebuilt: %s", str(error))
            for future in waiting:
                future.set_exception(_bare(error))
            return
        logger.warning("KV link rebuilt; %d quarantined pieces settled", len(held))
        for piece in held:
            self._land(piece)
        self._is_broken = False
        self.counters.recycles += 1
        for future in waiting:
            future.set_result(None)

    def _shut_down(self) -> None:
        self._drain_commands()
        for read in self._open_reads():
            self._abandon(read, TransferTimeout("the transport was closed"))
        for piece in self._pieces:
            piece.posted.release()
        for future in self._recycles:
            future.set_exception(TransferError("the transport was closed"))
        try:
            self._link.close()
        except Exception as error:
            logger.error("KV link did not close cleanly: %s", str(error))
        for piece in list(self._pieces):
            self._land(piece)

    def _open_reads(self) -> list[BlockRead]:
        reads = dict.fromkeys(self._queued)
        reads.update(dict.fromkeys(p.read for p in self._pieces if not p.read.is_over))
        return list(reads)

    def _reads_of(self, peer: WorkerId) -> list[BlockRead]:
        return [r for r in self._open_reads() if r.peer == peer]


class _Unknown:
    """A piece that the link may or may not have begun to move."""

    def __init__(self, error: TransferError) -> None:
        self._error = error

    def is_done(self) -> bool:
        raise self._error

    def cancel(self) -> bool:
        return False

    def release(self) -> None:
        """The link has handed out nothing."""


def _named(error: Exception) -> TransferError:
    """A defect of a link ends the reads over it, not the thread that all links share."""
    if isinstance(error, TransferError):
        return error
    # The text only: a kept exception keeps frames, and with them the link's objects.
    logger.error("KV link failed unexpectedly: %s", "".join(traceback.format_exception(error)))
    return LinkBroken(f"the link failed unexpectedly ({type(error).__name__}: {error})")


def _num_descriptors(read: BlockRead, remote: BlockIds, local: BlockIds) -> int:
    if read.plan.is_whole_blocks:
        return count_runs(remote, local)
    return len(local) * int(read.plan.local.offsets.shape[1])


def _is_given_up(future: Future[ReadStats]) -> bool:
    return isinstance(future.exception(), TransferTimeout)


def _bare(error: Exception) -> Exception:
    """The error without its frames: they would keep the link's objects alive past a recycle."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error
