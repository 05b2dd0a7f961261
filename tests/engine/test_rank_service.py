"""What runs beside the steps in a rank's process: started with its pool, heard over a socket."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from baton.core.clock import ManualClock
from baton.core.errors import ConfigError
from baton.engine.config import EngineConfig
from baton.engine.factory import BuiltEngine, build_engine
from baton.engine.parallel import Parallel
from baton.engine.tensor_parallel.rank_service import RankServiceSpec
from tiny_llama import write_checkpoint

ECHO = "echo_service:EchoService"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", num_key_value_heads=4)


def build(folder: Path, service: RankServiceSpec | None, **settings: object) -> BuiltEngine:
    config = EngineConfig(
        model_path=folder,
        dtype="float32",
        tp_size=2,
        kv_cache_bytes=1 << 18,
        num_threads=1,
        **settings,  # type: ignore[arg-type]
    )
    return build_engine(config, clock=ManualClock(), rank_service=service, num_scratch_blocks=2)


@pytest.fixture(scope="module")
def built(folder: Path) -> Iterator[BuiltEngine]:
    built = build(folder, RankServiceSpec(ECHO, {"any": "thing"}), pool_per_rank=True)
    assert built.ranks is not None
    yield built
    built.ranks.close()


def test_a_service_gets_its_settings_and_the_pool_of_its_rank(built: BuiltEngine) -> None:
    assert built.ranks is not None
    (connection,) = built.ranks.take_service_sockets()
    connection.settimeout(10)
    settings, pool_bytes, kv = pickle.loads(connection.recv(1 << 16))
    connection.close()
    assert settings == {"any": "thing"}
    assert kv.parallel == Parallel(1, 2)
    assert built.kv.parallel == Parallel(0, 2)
    assert kv.layout == built.kv.layout == built.layout
    assert kv.layout.num_kv_heads == 4
    assert (kv.num_blocks, kv.num_scratch_blocks) == (built.num_blocks, 2)
    assert kv.num_bytes == pool_bytes == (kv.num_blocks + 2) * kv.layout.block_bytes // 2
    assert kv.device_id is None


def test_the_end_of_a_rank_ends_its_stream(folder: Path) -> None:
    built = build(folder, RankServiceSpec(ECHO, 1))
    assert built.ranks is not None
    (connection,) = built.ranks.take_service_sockets()
    (pid,) = built.ranks.pids
    built.ranks.close()
    assert not psutil.pid_exists(pid)
    connection.settimeout(10)
    # What was said before, then the end.
    while connection.recv(1 << 16):
        pass
    connection.close()


def test_ranks_that_share_a_pool_name_it_as_a_whole(folder: Path) -> None:
    built = build(folder, None)
    assert built.ranks is not None
    assert built.kv.parallel == Parallel(0, 1)
    assert built.kv.num_bytes == (built.num_blocks + 2) * built.layout.block_bytes
    built.ranks.close()


@pytest.mark.parametrize(
    ("service", "reason"),
    [
        (RankServiceSpec(ECHO, "refuse"), "the service does not like this machine"),
        (RankServiceSpec("no_such_module:x", 1), "rank service 'no_such_module:x' cannot be"),
        (RankServiceSpec("echo_service:missing", 1), "'echo_service:missing' cannot be loaded"),
    ],
)
def test_a_service_that_does_not_start_is_a_configuration_error(
    folder: Path, service: RankServiceSpec, reason: str
) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(ConfigError, match=reason):
        build(folder, service, pool_per_rank=True)
    assert set(psutil.Process().children()) <= before


def test_sockets_of_ranks_are_not_inherited(built: BuiltEngine) -> None:
    assert built.ranks is not None
    (connection,) = built.ranks.take_service_sockets()
    assert isinstance(connection, socket.socket)
    assert not connection.get_inheritable()
    connection.close()
