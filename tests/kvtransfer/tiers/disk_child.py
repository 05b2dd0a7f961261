"""A disk tier in a process of its own, for limits that hold for a process or a mount.

Puts blocks until the tier takes no more, says why, makes room as told, and goes on. Prints one
JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from baton.core.block import BlockHash
from baton.core.clock import ManualClock
from kvtransfer.tiers.disk_tier import DiskTier
from kvtransfer.tiers.slab import SlabFormat

BLOCK_BYTES = 32768
NOBODY = 65534


def main(path: Path, limit: str) -> None:
    if limit == "file size":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    elif limit == "owner":
        os.setresuid(NOBODY, NOBODY, NOBODY)
    elif limit == "read-only":
        remount(path, "ro")
    clock = ManualClock()
    form = SlabFormat("0" * 16, BLOCK_BYTES, 1 << 20)
    tier = DiskTier(path, 64 << 20, form, clock=clock, retry_s=10.0, max_scan_s=10.0)
    if limit == "life":
        write_until_killed(
            DiskTier(path, 1 << 20, form, clock=clock, retry_s=10.0, max_scan_s=10.0)
        )
    num_put = 0
    while num_put < 200 and put(tier, num_put):
        num_put += 1
    answer = {
        "num_put": num_put,
        "num_read": sum(read(tier, n) for n in range(num_put)),
        "reason": tier.reason,
        "is_taken_within_pause": put(tier, 1000),
    }
    tier.check_integrity()
    if limit == "file size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    elif limit == "space":
        (path / "filler").unlink()
    elif limit == "read-only":
        remount(path, "rw")
    clock.advance(10.0)
    answer["is_taken_afterwards"] = put(tier, 1000) and read(tier, 1000)
    answer["reason_afterwards"] = tier.reason
    answer["num_unfinished"] = len(list(path.glob("*/*.new"))) if answer["num_put"] else 0
    tier.check_integrity()
    tier.close()
    answer["num_open"] = len(os.listdir("/proc/self/fd"))
    print(json.dumps(answer))


def write_until_killed(tier: DiskTier) -> None:
    """Far more blocks than fit, one over the other; says when all slots are in use."""
    for number in range(100_000):
        assert put(tier, number), tier.reason
        if number == 100:
            print("full", flush=True)


def remount(path: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(path)], check=True)


def block(number: int) -> tuple[BlockHash, bytes]:
    digest = BlockHash(hashlib.blake2b(str(number).encode(), digest_size=16).digest())
    return digest, hashlib.shake_128(digest).digest(BLOCK_BYTES)


def put(tier: DiskTier, number: int) -> bool:
    block_hash, content = block(number)
    return tier.put(block_hash, memoryview(content))


def read(tier: DiskTier, number: int) -> bool:
    block_hash, content = block(number)
    memory = bytearray(BLOCK_BYTES)
    is_found = tier.read(block_hash, memoryview(memory))
    assert not is_found or memory == content
    return is_found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
