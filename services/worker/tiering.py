"""Blocks between the pool and the tiers, beside the engine's work.

    save      the pool runs low on empty blocks (`on_load`) ─► the engine leases its coldest cached
              blocks that are not saved yet ─► the saver copies them to the host tier ─► the engine
              is told, and evicts them whenever it likes; it never waits for this
    write     the disk writer copies the host tier's cold end to the disk tier
    restore   a request's import asks for blocks ─► the reader copies them into the given blocks of
              the pool, from the host tier or through it from the disk tier

Saver, writer and reader are threads of their own, which sleep while there is nothing to do. They
copy at a bounded pace and in pieces, so that neither the event loop nor the engine's thread waits
and decode keeps its memory bandwidth. A drive that hangs holds up the thread in it, and no blocks
of the pool.

Not known here: which request a restore is for, whether it is worth it, imports.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from baton.core.block import BlockHash, BlockId
from baton.core.clock import MonotonicClock
from baton.core.errors import InternalError, TransferError, Unavailable
from baton.core.fabric import FabricCounters, TierReport
from baton.core.worker_info import LoadReport
from kvtransfer.tiers.config import TierConfig
from kvtransfer.tiers.copier import BlockCopier
from kvtransfer.tiers.tiers import Tiers
from services.worker.job_thread import JobThread

logger = logging.getLogger(__name__)

IDLE_PAUSE_S = 0.2
"""Before the engine is asked again when it had nothing unsaved, or nothing found room."""
MAX_STEP_S = 0.5
"""Of a longer step of the engine no more is made up for: bounds the blocks leased at once."""
TELL_PERIOD_S = 0.1
FAILURE_PAUSE_S = 10.0
JOIN_TIMEOUT_S = 2.0
"""Beyond the flush; a thread that hangs in the kernel is left behind."""


class UnsavedBlocks(Protocol):
    """What is needed of `EngineLoop`."""

    async def take_unsaved(self, max_blocks: int) -> list[tuple[BlockHash, BlockId]]:
        """The coldest cached blocks not saved yet, leased. Raises Unavailable."""
        ...

    def release_saved(self, block_ids: Sequence[BlockId], *, is_saved: bool) -> None: ...

    def attach_tiers(self, tiers: Tiers) -> None:
        """Before the engine runs: their contents are told to routers."""
        ...

    def tell_tiers(self) -> None:
        """The contents have changed, and the engine may have nothing to do."""
        ...


class Tiering:
    """The tiers of one worker. Methods are called on the event loop's thread."""

    def __init__(
        self,
        tiers: Tiers,
        copier: BlockCopier,
        engine: UnsavedBlocks,
        *,
        config: TierConfig,
    ) -> None:
        self._tiers = tiers
        self._copier = copier
        self._engine = engine
        self._config = config
        self._num_wanted = tiers.piece_blocks
        """To be asked of the engine at once."""
        self._num_saved = 0
        self._num_restored = 0
        self._saver = JobThread("tier saver")
        self._writer = JobThread("tier writer", work=self._write_back)
        self._reader = JobThread("tier reader")
        self._is_pool_low = asyncio.Event()
        self._stopping = asyncio.Event()
        self._is_usable = False
        """The copier is ready."""
        self._given_up: Future[int] | None = None
        """The restore that took too long; until it ends the reader's thread is not to be had."""
        self._no_write_before_s = 0.0
        self._saving: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        engine.attach_tiers(tiers)

    def start(self) -> None:
        """Start the threads; they register the memory and read the directory."""
        for thread in (self._saver, self._writer, self._reader):
            thread.start()
        registered = self._saver.submit(lambda: self._copier.register(self._tiers.host.arena))
        self._reader.submit(registered.result)
        self._saving = asyncio.create_task(self._save_when_low(registered))
        self._telling = asyncio.create_task(self._tell_changes())

    async def stop(self) -> None:
        """Write what can be written within `flush_timeout_s`, let go of the directory, end.

        The engine's loop must still run: blocks being saved are given back to it.
        """
        self._stopping.set()
        self._is_pool_low.set()
        if self._telling is not None:
            self._telling.cancel()
        deadline_s = time.monotonic() + self._config.flush_timeout_s + JOIN_TIMEOUT_S
        if self._saving is not None:
            await asyncio.wait([self._saving], timeout=JOIN_TIMEOUT_S)
            self._saving.cancel()
        with contextlib.suppress(Unavailable):
            self._writer.submit(self._flush)
        have_ended = True
        for thread in (self._saver, self._writer, self._reader):
            thread.stop()
            left_s = max(0.1, deadline_s - time.monotonic())
            have_ended &= await asyncio.to_thread(thread.join, left_s)
        if have_ended:
            # A thread that is left behind may still copy to pinned memory.
            self._copier.close()

    def on_load(self, load: LoadReport) -> None:
        """The engine's load after a step: says whether blocks are about to be evicted."""
        is_low = load.free_blocks < load.total_blocks * self._config.save_below_free_ratio
        if is_low and load.cached_blocks:
            self._is_pool_low.set()
        elif not self._stopping.is_set():
            self._is_pool_low.clear()

    def restorable(self, block_hashes: Sequence[BlockHash]) -> int:
        """Length of the longest leading part of `block_hashes` that the tiers hold now.

        Cheap; what is found may be gone, or corrupt, when it is restored.
        """
        if not self._is_usable or self._is_reader_held_up:
            return 0
        return self._tiers.num_restorable(block_hashes)

    async def restore(self, block_hashes: Sequence[BlockHash], block_ids: Sequence[BlockId]) -> int:
        """Copy a leading part of the blocks into `block_ids` of the pool; its length.

        What came from disk was verified; a corrupt block ends the run there and is dropped. Ends
        within `restore_timeout_s` with what is there by then. After it has returned or raised
        (CancelledError alone) nothing writes to `block_ids` any more.
        """
        if len(block_hashes) != len(block_ids):
            raise InternalError(f"{len(block_hashes)} hashes for {len(block_ids)} blocks")
        delivery = _Delivery(self._copier)
        if not self._is_usable or self._is_reader_held_up:
            return 0
        try:
            job = self._reader.submit(
                lambda: self._tiers.load(block_hashes, block_ids, delivery.deliver)
            )
        except Unavailable:
            return 0
        try:
            async with asyncio.timeout(self._config.restore_timeout_s):
                await asyncio.wrap_future(job)
        except TimeoutError:
            self._given_up = job
            logger.warning(
                "restoring %d blocks took more than %g s (tiers.restore_timeout_s); given up",
                len(block_ids),
                self._config.restore_timeout_s,
            )
        except TransferError as error:
            logger.warning("restoring ended: %s", error)
        finally:
            num_restored = delivery.end()
            self._num_restored += num_restored
        return num_restored

    def reports(self) -> tuple[TierReport, ...]:
        return self._tiers.reports()

    def count(self, counters: FabricCounters) -> None:
        """Set what the tiers know of the counters."""
        counters.saved_blocks = self._num_saved
        counters.restored_blocks = self._num_restored
        counters.corrupt_blocks = self._tiers.num_corrupt

    @property
    def is_quiet(self) -> bool:
        """Nothing is being copied."""
        return self._tiers.is_quiet

    @property
    def _is_reader_held_up(self) -> bool:
        return self._given_up is not None and not self._given_up.done()

    async def _save_when_low(self, registered: Future[None]) -> None:
        """Save pieces while the pool is low, at the configured pace."""
        try:
            await asyncio.wrap_future(registered)
            self._is_usable = True
            await self._is_pool_low.wait()
            while not self._stopping.is_set():
                pause_s = await self._save_some()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), pause_s)
                await self._is_pool_low.wait()
        except Unavailable:
            logger.info("tiers: the engine has stopped, nothing more is saved")
        except Exception:
            logger.exception("tiers are out of use")
            self._is_usable = False

    async def _tell_changes(self) -> None:
        """Each step of the engine tells them anyway; this is for when it has none to take."""
        while True:
            await asyncio.sleep(TELL_PERIOD_S)
            if self._tiers.has_changes:
                self._engine.tell_tiers()

    async def _save_some(self) -> float:
        """The pause until the next. Raises Unavailable when the engine has stopped."""
        started_s = time.monotonic()
        taken = await self._engine.take_unsaved(self._num_wanted)
        waited_s = time.monotonic() - started_s
        pace = self._config.save_bytes_per_second / self._tiers.host.block_bytes
        # The engine answers once per step: at the pace, so much may be saved until then.
        self._num_wanted = max(self._tiers.piece_blocks, int(pace * min(waited_s, MAX_STEP_S)))
        try:
            num_saved = await self._save_all(taken)
        except Exception:
            logger.exception("saving blocks failed; tried again in %g s", FAILURE_PAUSE_S)
            return FAILURE_PAUSE_S
        if not num_saved and not self._stopping.is_set():
            # The next report of a low pool starts it again.
            self._is_pool_low.clear()
            return IDLE_PAUSE_S
        return max(0.0, num_saved / pace - (time.monotonic() - started_s))

    async def _save_all(self, taken: Sequence[tuple[BlockHash, BlockId]]) -> int:
        """How many of the leased blocks are saved now, piece by piece; all are released."""
        num_done = num_saved = 0
        try:
            while num_done < len(taken) and not self._stopping.is_set():
                piece = taken[num_done : num_done + self._tiers.piece_blocks]
                num_done += len(piece)
                num_saved += await self._save(piece)
        finally:
            if left := [block_id for _, block_id in taken[num_done:]]:
                self._engine.release_saved(left, is_saved=False)
        return num_saved

    async def _save(self, piece: Sequence[tuple[BlockHash, BlockId]]) -> int:
        """How many of the leased blocks are saved now; all are released, also when this raises.

        Cancelled while the copy is under way they stay leased: nobody may write to them then.
        """
        saved: set[BlockId] = set()
        is_copying = False
        try:
            job = self._saver.submit(lambda: self._tiers.save(piece, self._copier))
            saved.update([*await asyncio.wrap_future(job)])
            self._writer.wake()
        except asyncio.CancelledError:
            is_copying = True
            raise
        finally:
            for is_saved in (True, False):
                ids = [block_id for _, block_id in piece if (block_id in saved) is is_saved]
                if ids and not is_copying:
                    self._engine.release_saved(ids, is_saved=is_saved)
        self._num_saved += len(saved)
        return len(saved)

    # Below: on the writer's thread.

    def _write_back(self) -> float | None:
        """One cold block to disk, and the pause until the next, which a `wake` does not shorten."""
        started_s = time.monotonic()
        if started_s < self._no_write_before_s:
            return self._no_write_before_s - started_s
        num_bytes = self._tiers.write_back()
        if not num_bytes:
            return self._tiers.retry_in_s
        self._no_write_before_s = started_s + num_bytes / self._config.disk_bytes_per_second
        return max(0.0, self._no_write_before_s - time.monotonic())

    def _flush(self) -> None:
        try:
            num_written = self._tiers.flush(MonotonicClock(), self._config.flush_timeout_s)
            if num_written:
                logger.info("disk tier: %d blocks written at the end", num_written)
        finally:
            self._tiers.close()


class _Delivery:
    """Copies into the pool for one restore, until it is ended from another thread."""

    def __init__(self, copier: BlockCopier) -> None:
        self._copier = copier
        self._lock = threading.Lock()
        self._has_ended = False
        self._num_delivered = 0

    def deliver(self, slots: Sequence[memoryview], block_ids: Sequence[BlockId]) -> bool:
        with self._lock:
            if not self._has_ended:
                self._copier.copy_in(slots, block_ids)
                self._num_delivered += len(block_ids)
            return not self._has_ended

    def end(self) -> int:
        """Blocks delivered; none is any more. Waits for one piece at most."""
        with self._lock:
            self._has_ended = True
            return self._num_delivered
