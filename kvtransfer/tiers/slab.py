"""The file format of the disk tier: slabs of equal slots, with an index at the start of each.

    slab    header page | table: one entry of 64 bytes per slot | slot 0 | slot 1 | ...
    entry   block hash, length, stamp, checksum of the block, checksum of the entry

One file per block would cost an inode, a rename and an unlink for each of up to a million blocks,
and a million opens to find them again at start; a slab holds about 256 MiB of them, and its table
is read in one go. Slabs are sparse: only slots in use take space.

Nothing is trusted at start but what its own checksum confirms: an entry is verified when its slab
is opened, a block when it is read. So no order of writes has to be forced, and a crash or a power
cut costs at most the blocks it tore.

Source of the checksum: CRC-32 of zlib (ISO 3309), seeded with the block's hash; it releases the
interpreter and runs faster than a drive reads.

Not known here: which blocks are worth keeping, errors of the operating system.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from baton.core.block import HASH_BYTES, BlockHash

MAGIC = b"BATONKV\n"
VERSION = 1
PAGE_BYTES = 4096
ENTRY_BYTES = 64
SLAB_BYTES = 256 << 20
"""Of slots in one file: a terabyte is four thousand files."""

_HEADER = struct.Struct("<8sI16sQQ")
_CHECKSUM = struct.Struct("<I")
_ENTRY = struct.Struct(f"<{HASH_BYTES}sQQI")
_NAME = re.compile(r"slab-([0-9a-f]{16})-(\d{6})\.kv(\.new)?")
EMPTY_ENTRY = bytes(ENTRY_BYTES)


class SlabName(NamedTuple):
    fingerprint: str
    number: int
    is_unfinished: bool
    """Left behind by a process that ended while it created the file."""


class Entry(NamedTuple):
    """What the table says of one slot."""

    slot: int
    """Counted within the slab."""
    block_hash: BlockHash
    stamp: int
    """Higher is newer, over all slabs of a worker."""
    checksum: int


class Table(NamedTuple):
    entries: list[Entry]
    num_broken: int
    """Neither empty nor intact, or of blocks that the file is too short for."""


def parse_name(name: str) -> SlabName | None:
    """None for files that are not ours."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return SlabName(match[1], int(match[2]), match[3] is not None)


def block_checksum(block_hash: BlockHash, memory: memoryview) -> int:
    return zlib.crc32(memory, zlib.crc32(block_hash))


def pack_entry(entry: Entry, num_bytes: int) -> bytes:
    body = _ENTRY.pack(entry.block_hash, num_bytes, entry.stamp, entry.checksum)
    return (body + _CHECKSUM.pack(zlib.crc32(body))).ljust(ENTRY_BYTES, b"\0")


def unpack_entry(slot: int, raw: bytes, num_bytes: int) -> Entry | None:
    """None unless the entry is intact and of a block of `num_bytes`."""
    body = raw[: _ENTRY.size]
    if len(raw) < ENTRY_BYTES or _CHECKSUM.unpack_from(raw, _ENTRY.size)[0] != zlib.crc32(body):
        return None
    block_hash, length, stamp, checksum = _ENTRY.unpack(body)
    if length != num_bytes:
        return None
    return Entry(slot, BlockHash(block_hash), stamp, checksum)


@dataclass(frozen=True, slots=True)
class SlabFormat:
    """Where everything lies in the slabs of one layout."""

    fingerprint: str
    """Of the KV layout: 16 hex digits."""
    block_bytes: int
    slab_bytes: int = SLAB_BYTES

    @property
    def slot_bytes(self) -> int:
        """Whole pages, so that blocks are read and written without touching a neighbour's page."""
        return _whole_pages(self.block_bytes)

    @property
    def slots_per_slab(self) -> int:
        return max(1, self.slab_bytes // self.slot_bytes)

    @property
    def data_offset(self) -> int:
        return PAGE_BYTES + _whole_pages(ENTRY_BYTES * self.slots_per_slab)

    @property
    def min_bytes(self) -> int:
        """Of a tier with one slot."""
        return self.data_offset + self.slot_bytes

    def num_slots_in(self, max_bytes: int) -> int:
        """Slots of files that take at most `max_bytes` together."""
        full_bytes = self.data_offset + self.slots_per_slab * self.slot_bytes
        num_full, left = divmod(max_bytes, full_bytes)
        num_more = max(0, left - self.data_offset) // self.slot_bytes
        return num_full * self.slots_per_slab + num_more

    def name(self, number: int) -> str:
        return f"slab-{self.fingerprint}-{number:06d}.kv"

    def header(self) -> bytes:
        body = _HEADER.pack(
            MAGIC,
            VERSION,
            self.fingerprint.encode(),
            self.block_bytes,
            self.slots_per_slab,
        )
        return (body + _CHECKSUM.pack(zlib.crc32(body))).ljust(PAGE_BYTES, b"\0")

    def entry_offset(self, slot: int) -> int:
        return PAGE_BYTES + slot * ENTRY_BYTES

    def block_offset(self, slot: int) -> int:
        return self.data_offset + slot * self.slot_bytes

    def read_table(self, file: int) -> Table | None:
        """What a slab holds; None when it is no slab of this format. Raises OSError."""
        head = os.pread(file, self.data_offset, 0)
        if len(head) < self.data_offset or head[:PAGE_BYTES] != self.header():
            return None
        table = head[PAGE_BYTES : PAGE_BYTES + ENTRY_BYTES * self.slots_per_slab]
        is_used = np.frombuffer(table, dtype=np.uint8).reshape(-1, ENTRY_BYTES).any(axis=1)
        file_bytes = os.fstat(file).st_size
        entries = []
        num_broken = 0
        for slot in np.flatnonzero(is_used).tolist():
            raw = table[slot * ENTRY_BYTES : (slot + 1) * ENTRY_BYTES]
            entry = unpack_entry(slot, raw, self.block_bytes)
            if entry is None or self.block_offset(slot) + self.block_bytes > file_bytes:
                num_broken += 1
            else:
                entries.append(entry)
        return Table(entries, num_broken)


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite until all is written: a full disk cuts a write short before it fails.

    Raises OSError.
    """
    left = memoryview(data).cast("B")
    while len(left):
        num_written = os.pwrite(file, left, offset)
        offset += num_written
        left = left[num_written:]


def read_all(file: int, memory: memoryview, offset: int) -> bool:
    """Fill `memory`; False where the file ends before. Raises OSError."""
    left = memory
    while len(left):
        num_read = os.preadv(file, [left], offset)
        if num_read == 0:
            return False
        offset += num_read
        left = left[num_read:]
    return True
