import os
import random

import pytest

from kvtransfer.tiers.slab import (
    PAGE_BYTES,
    Entry,
    SlabFormat,
    pack_entry,
    parse_name,
    unpack_entry,
    write_all,
)

BLOCK_BYTES = (1, 4096, 4097, 11 * 1024, 184320, 2 << 20, 16 << 20, 300 << 20)


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
def test_slots_follow_the_table_and_each_other(block_bytes):
    form = SlabFormat("0" * 16, block_bytes)
    last = form.slots_per_slab - 1
    assert form.entry_offset(last) + 64 <= form.data_offset == form.block_offset(0)
    assert form.data_offset % PAGE_BYTES == 0
    assert form.slot_bytes >= block_bytes
    assert form.block_offset(last) == form.data_offset + last * form.slot_bytes


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
def test_files_stay_within_the_bound(block_bytes):
    form = SlabFormat("0" * 16, block_bytes)
    full = form.data_offset + form.slots_per_slab * form.slot_bytes
    rng = random.Random(block_bytes)
    for _ in range(200):
        max_bytes = rng.randrange(3 * full)
        num_slots = form.num_slots_in(max_bytes)
        num_full, rest = divmod(num_slots, form.slots_per_slab)
        used = num_full * full + (form.data_offset + rest * form.slot_bytes if rest else 0)
        assert used <= max_bytes
        assert max_bytes - used < form.data_offset + form.slot_bytes
    assert form.num_slots_in(form.min_bytes) == 1
    assert form.num_slots_in(form.min_bytes - 1) == 0


def test_names_are_told_from_strangers():
    form = SlabFormat("0123456789abcdef", 4096)
    assert parse_name(form.name(7)) == ("0123456789abcdef", 7, False)
    assert parse_name(form.name(7) + ".new") == ("0123456789abcdef", 7, True)
    for name in ("lock", "slab-0-0.kv", form.name(7) + ".bak", "x" + form.name(7)):
        assert parse_name(name) is None


def test_every_flipped_bit_of_an_entry_is_noticed(h):
    entry = Entry(3, h(1), 77, 0xDEADBEEF)
    raw = pack_entry(entry, 4096)
    assert unpack_entry(3, raw, 4096) == entry
    assert unpack_entry(3, raw, 8192) is None
    assert unpack_entry(3, raw[:40], 4096) is None
    for bit in range(8 * 40):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        assert unpack_entry(3, bytes(changed), 4096) is None


@pytest.mark.parametrize("change", ["none", "magic", "block size", "short", "noise"])
def test_table_of_another_format_is_none(tmp_path, h, change):
    form = SlabFormat("0" * 16, 4096, 4 * 4096)
    path = tmp_path / form.name(0)
    data = bytearray(form.header() + bytes(form.data_offset - PAGE_BYTES) + bytes(4096))
    data[PAGE_BYTES : PAGE_BYTES + 64] = pack_entry(Entry(0, h(1), 1, 0), 4096)
    data[PAGE_BYTES + 64 : PAGE_BYTES + 128] = pack_entry(Entry(1, h(2), 2, 0), 4096)
    if change == "magic":
        data[0] ^= 1
    elif change == "short":
        del data[form.data_offset - 1 :]
    elif change == "noise":
        data = bytearray(random.Random(1).randbytes(len(data)))
    elif change == "block size":
        form = SlabFormat("0" * 16, 2048, 4 * 4096)
    path.write_bytes(data)
    file = os.open(path, os.O_RDONLY)
    try:
        table = form.read_table(file)
    finally:
        os.close(file)
    if change == "none":
        assert table.entries == [Entry(0, h(1), 1, 0)]
        assert table.num_broken == 1, "the file is too short for the second block"
    else:
        assert table is None


def test_cut_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:7], at))
    with (tmp_path / "file").open("wb") as file:
        write_all(file.fileno(), bytes(range(100)), 5)
    assert (tmp_path / "file").read_bytes() == bytes(5) + bytes(range(100))
