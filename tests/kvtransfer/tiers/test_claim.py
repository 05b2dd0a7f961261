import os
import subprocess
import sys

import pytest

from kvtransfer.tiers.claim import MAX_WORKERS, claim, remove_strangers
from kvtransfer.tiers.slab import SlabFormat

FORM = SlabFormat("a" * 16, 4096)
OTHER = SlabFormat("b" * 16, 4096)


def test_two_workers_take_a_directory_each(tmp_path):
    first = claim(tmp_path, FORM.fingerprint)
    second = claim(tmp_path, FORM.fingerprint)
    assert first.directory.name == "worker-000"
    assert second.directory.name == "worker-001"
    first.release()
    third = claim(tmp_path, FORM.fingerprint)
    assert third.directory == first.directory
    for held in (second, third):
        held.release()


def test_directory_of_a_killed_process_is_free_again(tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from kvtransfer.tiers.claim import claim\n"
        f"held = claim(pathlib.Path(sys.argv[1]), {FORM.fingerprint!r})\n"
        "print(held.directory.name, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "worker-000\n"
        held = claim(tmp_path, FORM.fingerprint)
        assert held.directory.name == "worker-001", "a directory in use is left alone"
        held.release()
    finally:
        process.kill()
        process.communicate()
    held = claim(tmp_path, FORM.fingerprint)
    assert held.directory.name == "worker-000"
    held.release()


def test_worker_prefers_slabs_of_its_layout(tmp_path):
    for number, form in ((0, OTHER), (1, FORM)):
        directory = tmp_path / f"worker-{number:03d}"
        directory.mkdir(mode=0o700)
        (directory / form.name(0)).write_bytes(b"")
    first = claim(tmp_path, FORM.fingerprint)
    assert first.directory.name == "worker-001"
    second = claim(tmp_path, FORM.fingerprint)
    assert second.directory.name == "worker-000"
    for held in (first, second):
        held.release()


def test_only_files_that_are_ours_by_name_are_removed(tmp_path):
    for name in (OTHER.name(3), FORM.name(1) + ".new", FORM.name(1), "slab-x.kv", "notes.txt"):
        (tmp_path / name).write_bytes(b"?")
    assert remove_strangers(tmp_path, FORM.fingerprint) == 2
    assert {p.name for p in tmp_path.iterdir()} == {FORM.name(1), "slab-x.kv", "notes.txt"}


@pytest.mark.parametrize("kind", ["open to all", "link"])
def test_directory_that_others_may_change_is_passed_over(tmp_path, kind):
    trap = tmp_path / "worker-000"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        trap.symlink_to(tmp_path / "elsewhere")
    else:
        trap.mkdir()
        trap.chmod(0o777)
    held = claim(tmp_path, FORM.fingerprint)
    assert held.directory.name == "worker-001"
    assert held.directory.stat().st_mode & 0o777 == 0o700
    held.release()


def test_removed_directory_ends_the_claim(tmp_path):
    held = claim(tmp_path, FORM.fingerprint)
    assert held.is_in_force
    (held.directory / "lock").unlink()
    held.directory.rmdir()
    assert not held.is_in_force
    again = claim(tmp_path, FORM.fingerprint)
    assert again.directory == held.directory
    assert not held.is_in_force, "another claim took its place"
    assert again.is_in_force
    for one in (held, again):
        one.release()


def test_full_directory_is_refused_and_nothing_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    held = [claim(tmp_path, FORM.fingerprint) for _ in range(MAX_WORKERS)]
    with pytest.raises(OSError, match=f"{MAX_WORKERS} workers use the directory"):
        claim(tmp_path, FORM.fingerprint)
    for one in held:
        one.release()
        one.release()
    assert len(os.listdir("/proc/self/fd")) == before
