"""A real full disk, a real limit on file sizes, a real read-only mount, a directory of others.

A small file system is mounted in a mount namespace of its own, where the machine allows one.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from baton.core.clock import ManualClock
from kvtransfer.tiers.disk_tier import DiskTier
from kvtransfer.tiers.slab import SlabFormat

CHILD = Path(__file__).with_name("disk_child.py")
ROOT = CHILD.parents[3]
TIMEOUT_S = 30


def run(path, limit, *, mount=None):
    command = [sys.executable, str(CHILD), str(path), limit]
    if mount is not None:
        script = f'mount -t tmpfs -o {mount} none "$0" && head -c 300000 /dev/zero > "$0/filler"'
        command = ["unshare", "-rm", "sh", "-c", f'{script}; exec "$@"', str(path), *command]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def may_mount(path):
    try:
        done = subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(path)],
            capture_output=True,
            timeout=TIMEOUT_S,
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.fixture
def mount_point(tmp_path):
    if not may_mount(tmp_path):
        pytest.skip("this machine allows no mount namespace")
    return tmp_path


def check(answer):
    """What every limit has in common: blocks stay readable, and nothing is left open."""
    assert answer["num_read"] == answer["num_put"]
    assert not answer["is_taken_within_pause"]
    assert answer["num_unfinished"] == 0
    assert answer["num_open"] <= 5


def test_full_disk_stops_the_tier_until_there_is_room(mount_point):
    answer, log = run(mount_point, "space", mount="size=1m")
    check(answer)
    assert 5 < answer["num_put"] < 32
    assert "No space left on device; the disk is full; free some space" in answer["reason"]
    assert answer["is_taken_afterwards"]
    assert answer["reason_afterwards"] == ""
    assert "No space left" in log


def test_read_only_file_system_has_a_reason(mount_point):
    answer, _ = run(mount_point, "read-only", mount="size=20m")
    check(answer)
    assert "the file system is read-only; mount it writable" in answer["reason"]
    assert answer["is_taken_afterwards"]


def test_limit_on_file_sizes_has_a_reason(tmp_path):
    answer, _ = run(tmp_path, "file size")
    check(answer)
    assert 5 < answer["num_put"] < 16
    assert "the limit on file sizes is reached; raise it (ulimit -f)" in answer["reason"]
    assert answer["is_taken_afterwards"]


@pytest.mark.parametrize("delay_s", [0.0, 0.011, 0.023])
def test_killed_writer_leaves_nothing_that_is_wrong(tmp_path, delay_s):
    command = [sys.executable, str(CHILD), str(tmp_path), "life"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )
    try:
        assert process.stdout.readline() == "full\n"
        time.sleep(delay_s)
    finally:
        process.kill()
        process.communicate()
    form = SlabFormat("0" * 16, 32768, 1 << 20)
    clock = ManualClock()
    tier = DiskTier(tmp_path, 1 << 20, form, clock=clock, retry_s=10.0, max_scan_s=10.0)
    assert tier.open()
    num_found = len(tier)
    held = tier._index.coldest(num_found)
    memory = bytearray(32768)
    num_right = 0
    for block_hash in held:
        if tier.read(block_hash, memoryview(memory)):
            assert memory == hashlib.shake_128(block_hash).digest(32768)
            num_right += 1
    assert num_found >= form.num_slots_in(1 << 20) - 1, "the block being written at most"
    assert num_right == num_found
    tier.close()


def test_directory_of_another_user_has_a_reason(tmp_path):
    if os.geteuid() == 0:
        limit = "owner"
        for parent in (tmp_path, *tmp_path.parents):
            if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o005:
                # The child reaches the directory, and may not write there.
                parent.chmod(parent.stat().st_mode | 0o005)
    else:
        limit = "none"
    tmp_path.chmod(0o555)
    try:
        answer, _ = run(tmp_path, limit)
    finally:
        tmp_path.chmod(0o755)
    check(answer)
    assert answer["num_put"] == 0
    assert "may not be used by this user; change its owner or mode" in answer["reason"]
    assert not answer["is_taken_afterwards"]
