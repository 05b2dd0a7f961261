import asyncio
import dataclasses
import os
import stat
import subprocess
import sys

import pytest

from baton.core.clock import ManualClock
from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, Role, WorkerId, WorkerInfo
from baton.registry.directory import DirectoryRegistry, shared_secret


def make_info(name: str = "prefill-1", *, epoch: str = "e1", pid: int | None = None) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        epoch=Epoch(epoch),
        role=Role.PREFILL,
        address="127.0.0.1:1",
        model_name="m",
        layout=KvLayout("m", 2, 1, 4, 4, "float32"),
        num_blocks=8,
        max_model_len=64,
        max_num_seqs=4,
        transport="shm",
        pid=os.getpid() if pid is None else pid,
    )


@pytest.fixture
def clock():
    return ManualClock(100.0)


@pytest.fixture
def registry(tmp_path, clock):
    return DirectoryRegistry(tmp_path / "registry", clock=clock)


async def test_registered_worker_is_listed_with_all_its_fields(registry):
    info = make_info()
    await registry.register(info, ttl_s=5)
    assert await registry.list() == {info.worker_id: info}


async def test_registration_is_gone_after_its_time_to_live(registry, clock):
    await registry.register(make_info(), ttl_s=5)
    clock.advance(4.9)
    assert await registry.list()
    clock.advance(0.2)
    assert not await registry.list()


async def test_renewal_starts_the_time_to_live_anew(registry, clock):
    info = make_info()
    await registry.register(info, ttl_s=5)
    clock.advance(4)
    assert await registry.renew(info.worker_id, info.epoch)
    clock.advance(4)
    assert await registry.list()


async def test_older_epoch_can_neither_renew_nor_remove_the_newer(registry):
    old, new = make_info(epoch="e1"), make_info(epoch="e2")
    await registry.register(old, ttl_s=5)
    await registry.register(new, ttl_s=5)
    assert not await registry.renew(old.worker_id, old.epoch)
    await registry.deregister(old.worker_id, old.epoch)
    assert await registry.list() == {new.worker_id: new}


async def test_renewal_of_a_removed_worker_reports_it(registry):
    info = make_info()
    await registry.register(info, ttl_s=5)
    await registry.deregister(info.worker_id, info.epoch)
    assert not await registry.renew(info.worker_id, info.epoch)


async def test_dead_process_is_not_listed_and_its_file_is_swept(registry, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(20)
    await registry.register(make_info(pid=process.pid), ttl_s=5)
    assert not await registry.list()
    assert not list((tmp_path / "registry").glob("*.json"))


async def test_half_written_or_foreign_files_are_ignored(registry, tmp_path):
    info = make_info()
    await registry.register(info, ttl_s=5)
    (tmp_path / "registry" / "x.json").write_text('{"format": 1, "info"')
    (tmp_path / "registry" / "y.json").write_text('{"format": 99}')
    (tmp_path / "registry" / "z.json").write_text("[]")
    assert await registry.list() == {info.worker_id: info}


async def test_watch_yields_upon_change_only(registry):
    first, second = make_info("a"), make_info("b")
    seen: list[set[str]] = []

    async def follow() -> None:
        async for snapshot in registry.watch():
            seen.append(set(snapshot))

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.05)
    await registry.register(first, ttl_s=5)
    await asyncio.sleep(0.3)
    await registry.renew(first.worker_id, first.epoch)
    await asyncio.sleep(0.3)
    await registry.register(second, ttl_s=5)
    await asyncio.sleep(0.3)
    await registry.register(dataclasses.replace(second, epoch=Epoch("e2")), ttl_s=5)
    await asyncio.sleep(0.3)
    task.cancel()
    assert seen == [set(), {"a"}, {"a", "b"}, {"a", "b"}]


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "x" * 200])
async def test_worker_id_that_is_no_file_name_is_refused(registry, name):
    with pytest.raises(ConfigError, match="worker id"):
        await registry.register(make_info(name), ttl_s=5)


def test_directory_is_private_and_an_open_one_is_refused(tmp_path, clock):
    DirectoryRegistry(tmp_path / "new", clock=clock)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(ConfigError, match=r"0755.*chmod 700"):
        DirectoryRegistry(tmp_path / "open", clock=clock)


def test_all_processes_read_the_same_secret(tmp_path):
    directory = tmp_path / "registry"
    code = (
        "import sys; from pathlib import Path; from baton.registry.directory import shared_secret;"
        "print(shared_secret(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(directory)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    secrets = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert secrets == {shared_secret(directory)}
    assert len(secrets.pop()) == 64
    assert stat.S_IMODE((directory / "cluster-secret").stat().st_mode) == 0o600
    assert [path.name for path in directory.iterdir()] == ["cluster-secret"]
