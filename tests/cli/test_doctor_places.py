"""Where `baton doctor` finds workers, their secret and their certificates."""

from __future__ import annotations

import os

import pytest
import yaml

from baton.cli.certs import write_certificates
from baton.cli.doctor_places import Given, find_places, only_run_dir, process_ids
from baton.core.clock import ManualClock, MonotonicClock
from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, Role, WorkerId, WorkerInfo
from baton.registry.directory import DirectoryRegistry, shared_secret

DEAD_PID = 2**22 + 1
"""Above the largest that Linux gives."""


def make_info(name, address="127.0.0.1:7000", pid=None):
    layout = KvLayout("m", 1, 1, 1, 4, "float32")
    worker_id, pid = WorkerId(name), os.getpid() if pid is None else pid
    return WorkerInfo(
        worker_id, Epoch("e"), Role.DECODE, address, "m", layout, 4, 16, 2, "shm", pid
    )


@pytest.fixture
def make_run_dir(tmp_path):
    """A function that makes run directories with registered workers."""

    async def make(name, *infos, secret=True):
        path = tmp_path / name
        path.mkdir(mode=0o700)
        registry = DirectoryRegistry(path / "registry", clock=MonotonicClock())
        for info in infos:
            await registry.register(info, ttl_s=5)
        if secret:
            shared_secret(path / "registry")
        return path

    return make


async def test_run_directory_gives_workers_and_secret(make_run_dir):
    path = await make_run_dir("run", make_info("a"), make_info("b", "127.0.0.1:7001"))
    places = find_places(Given(run_dir=path), {})
    assert [place.address for place in places.workers] == ["127.0.0.1:7000", "127.0.0.1:7001"]
    assert places.secret == shared_secret(path / "registry").encode()
    assert places.tls is None
    assert process_ids(places.workers) == {"a": os.getpid(), "b": os.getpid()}


async def test_looking_removes_no_registration(make_run_dir):
    path = await make_run_dir("run", make_info("dead", pid=DEAD_PID))
    (place,) = find_places(Given(run_dir=path), {}).workers
    assert not place.entry.has_process
    assert (path / "registry" / "dead.json").exists()
    assert process_ids([place]) == {}


async def test_age_of_a_registration(tmp_path):
    clock = ManualClock()
    registry = DirectoryRegistry(tmp_path / "registry", clock=clock)
    await registry.register(make_info("a"), ttl_s=5)
    clock.advance(7)
    (entry,) = registry.entries()
    assert (entry.age_s, entry.ttl_s, entry.has_process) == (7, 5, True)


async def test_workers_named_by_hand_go_first_and_keep_their_registration(make_run_dir):
    path = await make_run_dir("run", make_info("a"), make_info("b", "127.0.0.1:7001"))
    given = Given(run_dir=path, workers=("127.0.0.1:7001", "otherhost:9"))
    one, other = find_places(given, {}).workers
    assert one.entry.info.worker_id == "b"
    assert (other.address, other.entry) == ("otherhost:9", None)


async def test_the_only_running_system_is_found(make_run_dir, tmp_path):
    await make_run_dir("baton-over", make_info("a", pid=DEAD_PID))
    with pytest.raises(ConfigError, match="no running `baton serve`"):
        only_run_dir(tmp_path)
    path = await make_run_dir("baton-now", make_info("a"))
    assert only_run_dir(tmp_path) == path
    await make_run_dir("baton-too", make_info("a"))
    with pytest.raises(ConfigError, match=r"2 systems run here.*baton-now, .*baton-too"):
        only_run_dir(tmp_path)


async def test_secret_comes_from_the_nearest_place(make_run_dir, tmp_path):
    path = await make_run_dir("run", make_info("a"))
    settings = {"transfer": {"cluster_secret": "of the run directory"}, "engine": {"x": 1}}
    (path / "decode-0.yaml").write_text(yaml.safe_dump(settings))
    file = tmp_path / "secret"
    file.write_text("of the file itself\n")
    environ = {"BATON_TRANSFER__CLUSTER_SECRET": "of the environment"}
    assert find_places(Given(run_dir=path), {}).secret == b"of the run directory"
    assert find_places(Given(run_dir=path), environ).secret == b"of the environment"
    given = Given(run_dir=path, overrides=("transfer.cluster_secret=of the command line",))
    assert find_places(given, environ).secret == b"of the command line"
    given = Given(run_dir=path, secret_file=file)
    assert find_places(given, environ).secret == b"of the file itself"


async def test_certificates_come_from_the_workers_settings_or_by_hand(make_run_dir, tmp_path):
    write_certificates(tmp_path / "tls")
    path = await make_run_dir("run", make_info("a"))
    names = {"ca_file": "ca.pem", "cert_file": "worker.pem", "key_file": "worker-key.pem"}
    tls = {setting: str(tmp_path / "tls" / name) for setting, name in names.items()}
    (path / "decode.yaml").write_text(yaml.safe_dump({"tls": tls}))
    by_run_dir = find_places(Given(run_dir=path), {}).tls
    assert by_run_dir is not None and by_run_dir.config.cert_file == tmp_path / "tls/worker.pem"
    by_hand = find_places(Given(run_dir=path, tls_dir=tmp_path / "tls"), {}).tls
    assert by_hand is not None and by_hand.config.cert_file == tmp_path / "tls/router.pem"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"workers": ("127.0.0.1:7000",)}, "cannot be measured without the cluster secret"),
        ({"workers": ("nowhere",), "secret_file": "secret"}, "not of the form HOST:PORT"),
        ({"workers": ("h:1",), "secret_file": "empty"}, "holds no cluster secret"),
        ({"workers": ("h:1",), "secret_file": "missing"}, "No such file"),
        ({"run_dir": "missing"}, "does not exist"),
        ({"run_dir": "."}, "no worker is registered"),
        ({"workers": ("h:1",), "overrides": ("transfer.lease=1",)}, "unknown setting"),
    ],
)
def test_what_is_missing_is_said(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("0123456789abcdef")
    (tmp_path / "empty").write_text("\n")
    paths = {
        name: tmp_path / value if name in ("secret_file", "run_dir") else value
        for name, value in given.items()
    }
    with pytest.raises(ConfigError, match=words):
        find_places(Given(**paths), {})
