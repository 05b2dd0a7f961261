"""Blocks whose bytes follow from their hash, and tiers of them with a pool beside."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from baton.core.block import BlockHash, BlockId
from baton.core.clock import ManualClock
from baton.core.kv_layout import KvLayout
from kvtransfer.tiers.copier import HostCopier
from kvtransfer.tiers.disk_tier import DiskTier
from kvtransfer.tiers.slab import SlabFormat
from kvtransfer.transport import PoolRegion

LAYOUT = KvLayout("model", 2, 2, 64, 16, "float32")
"""32 KiB a block."""


def hash_of(number: int) -> BlockHash:
    return BlockHash(hashlib.blake2b(str(number).encode(), digest_size=16).digest())


def content_of(block_hash: BlockHash, num_bytes: int = LAYOUT.block_bytes) -> bytes:
    return hashlib.shake_128(block_hash).digest(num_bytes)


class Pool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._memory = mmap.mmap(-1, num_blocks * LAYOUT.block_bytes)
        self.blocks = np.frombuffer(self._memory, dtype=np.uint8).reshape(num_blocks, -1)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        region = PoolRegion(address, len(self._memory), num_blocks, LAYOUT)
        self.copier = HostCopier(region)

    def fill(self, block_id: int, block_hash: BlockHash) -> None:
        self.blocks[block_id] = np.frombuffer(content_of(block_hash), dtype=np.uint8)

    def holds(self, block_id: int, block_hash: BlockHash) -> bool:
        return self.blocks[block_id].tobytes() == content_of(block_hash)

    def deliver(self, slots, block_ids: list[BlockId]) -> bool:
        self.copier.copy_in(slots, block_ids)
        return True


@dataclass
class DiskFolder:
    """A directory, and tiers in it one after the other."""

    path: Path
    clock: ManualClock

    def open(
        self,
        *,
        num_slots: int = 8,
        slots_per_slab: int = 4,
        fingerprint: str = LAYOUT.fingerprint,
        is_opened: bool = True,
        max_scan_s: float = 30.0,
    ) -> DiskTier:
        form = SlabFormat(fingerprint, LAYOUT.block_bytes, slots_per_slab * LAYOUT.block_bytes)
        num_slabs = -(-num_slots // slots_per_slab)
        max_bytes = num_slots * form.slot_bytes + num_slabs * form.data_offset
        assert form.num_slots_in(max_bytes) == num_slots
        tier = DiskTier(
            self.path, max_bytes, form, clock=self.clock, retry_s=10.0, max_scan_s=max_scan_s
        )
        if is_opened:
            assert tier.open(), tier.reason
        return tier

    @property
    def slabs(self) -> list[Path]:
        return sorted(self.path.glob("worker-*/slab-*"))

    @property
    def num_bytes(self) -> int:
        return sum(slab.stat().st_size for slab in self.slabs)


@pytest.fixture
def folder(tmp_path: Path) -> DiskFolder:
    return DiskFolder(tmp_path / "kv", ManualClock(100.0))


@pytest.fixture
def make_pool() -> Callable[[int], Pool]:
    return Pool


@pytest.fixture(scope="session")
def layout() -> KvLayout:
    return LAYOUT


@pytest.fixture(scope="session")
def h() -> Callable[[int], BlockHash]:
    """The hash of block n."""
    return hash_of


@pytest.fixture(scope="session")
def content() -> Callable[[BlockHash], bytes]:
    """The bytes of a block."""
    return content_of


def _put(tier: DiskTier, number: int) -> bool:
    return tier.put(hash_of(number), memoryview(content_of(hash_of(number))))


def _read(tier: DiskTier, number: int) -> bool:
    """Reads the block; asserts that its bytes are right when the tier says so."""
    memory = bytearray(LAYOUT.block_bytes)
    is_found = tier.read(hash_of(number), memoryview(memory))
    assert not is_found or bytes(memory) == content_of(hash_of(number))
    return is_found


@pytest.fixture(scope="session")
def put() -> Callable[[DiskTier, int], bool]:
    return _put


@pytest.fixture(scope="session")
def read() -> Callable[[DiskTier, int], bool]:
    return _read
