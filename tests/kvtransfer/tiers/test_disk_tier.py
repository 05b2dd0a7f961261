"""A directory of blocks that outlives its worker, and never gives back a wrong byte."""

import errno
import os
import shutil

import pytest

from baton.core.fabric import TierName


def test_blocks_come_back_until_they_make_room(folder, put, read):
    tier = folder.open(num_slots=6)
    for n in range(8):
        assert put(tier, n)
    assert [read(tier, n) for n in range(8)] == [False] * 2 + [True] * 6
    report = tier.report()
    assert (report.tier, report.num_blocks, report.reason) == (TierName.DISK, 6, "")
    assert folder.num_bytes <= report.max_bytes
    tier.check_integrity()
    tier.close()


def test_read_blocks_stay_longer(folder, put, read):
    tier = folder.open(num_slots=3)
    for n in range(3):
        put(tier, n)
    assert read(tier, 0)
    put(tier, 3)
    assert read(tier, 0)
    assert not read(tier, 1)
    tier.close()


def test_restarted_tier_finds_its_blocks(folder, put, read):
    first = folder.open()
    for n in range(10):
        put(first, n)
    first.close()
    assert len(first) == 0
    second = folder.open()
    assert len(second) == 8
    assert all(read(second, n) for n in range(2, 10))
    for n in range(10, 13):
        assert put(second, n)
    second.close()
    third = folder.open()
    assert [n for n in range(13) if read(third, n)] == list(range(5, 13)), "the oldest left first"
    third.check_integrity()
    third.close()
    assert all(slab.suffix == ".kv" for slab in folder.slabs)


def test_two_tiers_in_one_directory_do_not_mix(folder, put, read):
    first = folder.open()
    put(first, 1)
    second = folder.open()
    put(second, 2)
    assert read(first, 1) and not read(first, 2)
    assert read(second, 2) and not read(second, 1)
    assert len({slab.parent for slab in folder.slabs}) == 2
    first.close()
    second.close()


def test_slabs_of_another_layout_are_removed(folder, put, read):
    old = folder.open(fingerprint="f" * 16)
    put(old, 1)
    old.close()
    new = folder.open()
    assert not read(new, 1)
    assert folder.slabs == []
    put(new, 2)
    new.close()


def test_smaller_bound_removes_what_lies_beyond(folder, put, read):
    large = folder.open(num_slots=12)
    for n in range(12):
        put(large, n)
    large.close()
    small = folder.open(num_slots=6)
    assert len(small) == 6
    assert len(folder.slabs) == 2
    for n in range(20, 30):
        assert put(small, n)
    small.check_integrity()
    small.close()


@pytest.mark.parametrize("where", ["block", "entry"])
def test_corrupt_block_is_dropped_and_counted(folder, put, read, where):
    tier = folder.open()
    for n in range(3):
        put(tier, n)
    offset = 4096 + 64 + 5 if where == "entry" else folder.slabs[0].stat().st_size - 40_000
    flip(folder.slabs[0], offset)
    assert [read(tier, n) for n in range(3)] == [True, False, True]
    assert tier.num_corrupt == 1
    assert not read(tier, 1)
    assert tier.num_corrupt == 1, "counted once"
    assert put(tier, 1) and read(tier, 1)
    tier.close()
    tier = folder.open()
    assert len(tier) == 3
    assert tier.num_corrupt == 0
    tier.close()


def test_corrupt_entry_is_dropped_at_start(folder, put, read):
    tier = folder.open()
    for n in range(3):
        put(tier, n)
    tier.close()
    flip(folder.slabs[0], 4096 + 64)
    tier = folder.open()
    assert tier.num_corrupt == 1
    assert [read(tier, n) for n in range(3)] == [True, False, True]
    tier.close()


@pytest.mark.parametrize("keep", [0, 10, 4096, 8192, 8192 + 40_000])
def test_truncated_slab_does_no_harm(folder, put, read, keep):
    tier = folder.open()
    for n in range(6):
        put(tier, n)
    os.truncate(folder.slabs[0], keep)
    num_left = sum(read(tier, n) for n in range(6))
    assert tier.num_corrupt == 6 - num_left
    for n in range(20, 28):
        assert put(tier, n) and read(tier, n)
    tier.check_integrity()
    os.truncate(folder.slabs[1], keep)
    tier.close()
    tier = folder.open()
    num_found = len(tier)
    assert sum(read(tier, n) for n in range(28)) == num_found
    for n in range(30, 40):
        assert put(tier, n) and read(tier, n)
    tier.check_integrity()
    tier.close()


def test_foreign_file_under_our_name_is_removed_and_counted(folder, put, read):
    tier = folder.open()
    put(tier, 1)
    tier.close()
    slab = folder.slabs[0]
    slab.write_bytes(os.urandom(100_000))
    (slab.parent / "readme").write_text("mine")
    tier = folder.open()
    assert len(tier) == 0
    assert tier.num_corrupt == 1
    assert not slab.exists()
    assert (slab.parent / "readme").exists()
    assert put(tier, 1) and read(tier, 1)
    tier.close()


def test_block_swapped_for_another_is_noticed(folder, put, read):
    """Two intact blocks whose bytes changed places."""
    tier = folder.open()
    put(tier, 0)
    put(tier, 1)
    slab = folder.slabs[0]
    data = bytearray(slab.read_bytes())
    start = len(data) - 2 * 32768
    data[start:] = data[start + 32768 :] + data[start : start + 32768]
    slab.write_bytes(data)
    assert not read(tier, 0) and not read(tier, 1)
    tier.close()


def test_unfinished_slab_is_removed(folder, put):
    tier = folder.open()
    put(tier, 1)
    tier.close()
    left = folder.slabs[0].with_name(folder.slabs[0].name.replace("000000", "000001") + ".new")
    left.write_bytes(b"half")
    folder.open().close()
    assert not left.exists()


def test_torn_write_is_never_read(folder, put, read, monkeypatch):
    """The process ends in the middle of writing a block over another."""
    tier = folder.open(num_slots=1)
    put(tier, 1)
    real = os.pwrite

    def tear(file, data, offset):
        if len(data) > 4096:
            real(file, data[:9000], offset)
            raise KeyboardInterrupt
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", tear)
    with pytest.raises(KeyboardInterrupt):
        put(tier, 2)
    monkeypatch.undo()
    tier.close()
    tier = folder.open(num_slots=1)
    assert not read(tier, 1) and not read(tier, 2)
    assert put(tier, 3) and read(tier, 3)
    tier.close()


def test_scan_ends_in_time(folder, put, read, monkeypatch):
    tier = folder.open(num_slots=12)
    for n in range(12):
        put(tier, n)
    tier.close()
    slow = type(folder.clock)(0.0)
    slow.now = lambda: slow.advance(2.0) or type(slow).now(slow)
    folder.clock = slow
    tier = folder.open(num_slots=12, max_scan_s=7.0)
    assert 0 < len(tier) < 12
    for n in range(12):
        assert read(tier, n) or put(tier, n)
    assert all(read(tier, n) for n in range(12))
    tier.check_integrity()
    tier.close()


def test_failed_write_pauses_and_tries_again(folder, put, read, monkeypatch):
    tier = folder.open()
    put(tier, 1)

    def fail(file, data, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fail)
    assert not put(tier, 2)
    assert "Input/output error; the drive reports an error" in tier.report().reason
    monkeypatch.undo()
    assert not put(tier, 2), "within the pause"
    assert read(tier, 1), "what is there stays readable"
    folder.clock.advance(tier.pause_s)
    assert put(tier, 2) and read(tier, 2)
    assert tier.report().reason == ""
    tier.check_integrity()
    assert tier.is_quiet
    tier.close()


def test_unreadable_block_is_dropped(folder, put, read, monkeypatch):
    tier = folder.open()
    put(tier, 1)

    def fail(file, buffers, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    assert not read(tier, 1)
    monkeypatch.undo()
    assert tier.num_corrupt == 1
    assert not read(tier, 1)
    assert put(tier, 1) and read(tier, 1)
    tier.close()


def test_no_more_descriptors_costs_no_blocks(folder, put, read, monkeypatch):
    tier = folder.open()
    put(tier, 1)
    tier.close()
    real = os.open

    def fail(path, flags, mode=0o777):
        if str(path).endswith(".kv"):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", fail)
    tier = folder.open(is_opened=False)
    assert not tier.open()
    assert "Too many open files" in tier.reason
    monkeypatch.undo()
    folder.clock.advance(10.0)
    assert tier.open() and read(tier, 1)
    tier.close()


def test_vanished_subdirectory_is_made_again(folder, put, read):
    tier = folder.open()
    put(tier, 1)
    shutil.rmtree(folder.slabs[0].parent)
    assert not read(tier, 1)
    assert put(tier, 2) and read(tier, 2)
    assert not read(tier, 1)
    tier.check_integrity()
    tier.close()


def test_vanished_directory_stops_the_tier_until_it_is_back(folder, put, read):
    """It may be a mount point: making it anew would fill another file system."""
    tier = folder.open()
    put(tier, 1)
    shutil.rmtree(folder.path)
    assert not put(tier, 2)
    assert "the directory is gone" in tier.report().reason
    assert not folder.path.exists()
    assert len(tier) == 0
    folder.path.mkdir()
    assert not put(tier, 2), "within the pause"
    folder.clock.advance(10.0)
    assert put(tier, 2) and read(tier, 2)
    tier.close()


def test_removed_slab_loses_its_blocks_alone(folder, put, read):
    tier = folder.open()
    for n in range(6):
        put(tier, n)
    folder.slabs[0].unlink()
    assert [read(tier, n) for n in range(6)] == [False] * 4 + [True] * 2
    assert tier.num_corrupt == 0
    folder.slabs[0].unlink()
    for n in range(10, 18):
        assert put(tier, n)
    assert all(read(tier, n) for n in range(10, 18))
    tier.check_integrity()
    tier.close()


def test_path_that_is_a_file_has_a_reason(folder):
    folder.path.write_text("not a directory")
    tier = folder.open(is_opened=False)
    assert not tier.open()
    assert "cannot be opened" in tier.reason
    folder.path.unlink()
    folder.clock.advance(10.0)
    assert tier.open()
    tier.close()


def test_nothing_stays_open(folder, put, read):
    before = sorted(os.listdir("/proc/self/fd"))
    tier = folder.open()
    for n in range(12):
        put(tier, n)
        read(tier, n)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1, "the lock"
    tier.close()
    tier.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not put(tier, 1) and not read(tier, 1)


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
