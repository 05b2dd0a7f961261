"""What a directory of slabs holds at start: one read per slab, in bounded time.

Slabs that are not of the expected form, or lie beyond the tier's bound, are removed; of a block
that is there twice the newer copy counts. What is not read in time is left as it is and
overwritten later.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from baton.core.block import BlockHash
from baton.core.clock import Clock
from kvtransfer.tiers.slab import Entry, SlabFormat, Table, parse_name

logger = logging.getLogger(__name__)

PROGRESS_PERIOD_S = 5.0


@dataclass(slots=True)
class Found:
    entries: list[Entry]
    """Oldest first, one per block; slots counted over all slabs."""
    num_broken: int
    """Entries and whole slabs that were not what they should be."""


@dataclass(slots=True)
class _Tally:
    newest: dict[BlockHash, Entry] = field(default_factory=dict)
    num_broken: int = 0

    def add(self, table: Table, first_slot: int, num_slots: int) -> None:
        self.num_broken += table.num_broken
        for entry in table.entries:
            slot = first_slot + entry.slot
            known = self.newest.get(entry.block_hash)
            if slot < num_slots and (known is None or known.stamp < entry.stamp):
                self.newest[entry.block_hash] = entry._replace(slot=slot)


def scan(
    directory: Path, slab_format: SlabFormat, *, num_slots: int, clock: Clock, max_scan_s: float
) -> Found:
    """Raises OSError when the directory itself cannot be read, or this process lacks the means."""
    started_s = reported_s = clock.now()
    tally = _Tally()
    numbers = sorted(_slab_numbers(directory, slab_format))
    for num_read, number in enumerate(numbers):
        first_slot = number * slab_format.slots_per_slab
        path = directory / slab_format.name(number)
        if first_slot >= num_slots:
            _remove(path)
            continue
        if clock.now() - started_s > max_scan_s:
            logger.warning(
                "disk tier: %d of %d slabs read in %g s (tiers.max_scan_s); the rest is forgotten",
                num_read,
                len(numbers),
                max_scan_s,
            )
            break
        if clock.now() - reported_s > PROGRESS_PERIOD_S:
            reported_s = clock.now()
            logger.info("disk tier: %d of %d slabs read", num_read, len(numbers))
        table = _read_table(path, slab_format, num_slots - first_slot)
        if table is None:
            tally.num_broken += 1
            _remove(path)
        else:
            tally.add(table, first_slot, num_slots)
    entries = sorted(tally.newest.values(), key=lambda entry: entry.stamp)
    logger.info(
        "disk tier: found %d blocks in %d slabs in %.2f s, %d broken",
        len(entries),
        len(numbers),
        clock.now() - started_s,
        tally.num_broken,
    )
    return Found(entries, tally.num_broken)


def _slab_numbers(directory: Path, slab_format: SlabFormat) -> list[int]:
    names = (parse_name(name) for name in os.listdir(directory))
    return [
        slab.number
        for slab in names
        if slab is not None
        and slab.fingerprint == slab_format.fingerprint
        and not slab.is_unfinished
    ]


def _read_table(path: Path, slab_format: SlabFormat, max_slots: int) -> Table | None:
    """None for what is no slab of this format, or unreadable. Raises OSError of this process.

    What lies beyond `max_slots` is cut off.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return None
    try:
        table = slab_format.read_table(file)
        if table is not None and max_slots < slab_format.slots_per_slab:
            end = slab_format.block_offset(max_slots)
            os.truncate(file, min(end, os.fstat(file).st_size))
        return table
    except OSError:
        return None
    finally:
        os.close(file)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
