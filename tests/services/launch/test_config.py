"""What each process is told, from one system configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from services.launch.config import SystemConfig, router_values, worker_values

MODEL = Path("/models/llama")


def test_section_values_win_over_what_the_system_derives() -> None:
    system = SystemConfig(
        model_path=MODEL,
        prefill={"engine": {"max_num_seqs": 4}},
        decode={"worker_id": "mine"},
    )
    prefill = worker_values(system, Role.PREFILL, 0)
    assert prefill["engine"] == {"model_path": "/models/llama", "max_num_seqs": 4}
    assert prefill["worker_id"] == "prefill-0"
    assert worker_values(system, Role.DECODE, 1)["worker_id"] == "mine"


def test_a_worker_is_told_the_engine_settings_of_both_pools() -> None:
    system = SystemConfig(model_path=MODEL, prefill={"engine": {"max_num_seqs": 4}})
    other = worker_values(system, Role.DECODE, 0)["other_engine"]
    assert other == {"model_path": "/models/llama", "max_num_seqs": 4}
    assert worker_values(system, Role.PREFILL, 0)["other_engine"] == {"model_path": str(MODEL)}


def test_router_gets_the_front_door_and_the_tokenizer() -> None:
    values = router_values(SystemConfig(model_path=MODEL, http_port=8123))
    assert values["http_port"] == 8123
    assert values["model_path"] == "/models/llama"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"http_port": 0}, "http_port must be between 1 and 65535, got 0"),
        ({"grpc_port": 8000}, "both 8000"),
        ({"num_decode": 0}, "at least one decode worker"),
    ],
)
def test_contradictions_are_refused_with_values(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SystemConfig(model_path=MODEL, **changes)


def test_one_router_shares_nothing() -> None:
    values = router_values(SystemConfig(model_path=MODEL))
    assert values["shared"] == {} and values["copy"] == {}
    assert worker_values(SystemConfig(model_path=MODEL), Role.DECODE, 0)["registry"] == {}


def test_copies_share_ports_and_redis(tmp_path: Path) -> None:
    url = "redis://:pw@127.0.0.1:6379/2"
    system = SystemConfig(model_path=MODEL, num_routers=3, redis_url=url, deployment="ours")
    values = router_values(system, index=2, targets_dir=tmp_path)
    assert values["shared"] == {"url": url, "deployment": "ours"}
    assert values["copy"] == {
        "shares_ports": True,
        "own_port": 0,
        "targets_dir": str(tmp_path),
        "name": "router-2",
    }
    assert worker_values(system, Role.PREFILL, 0)["registry"] == {"url": url, "deployment": "ours"}
    assert "pw" not in repr(system)


def test_copies_without_redis_share_an_actor_or_grant_their_part() -> None:
    system = SystemConfig(model_path=MODEL, num_routers=4)
    assert router_values(system, use_ray=True)["shared"]["place"] == "ray"
    assert router_values(system)["shared"] == {"num_copies": 4}


def test_the_name_of_a_deployment_can_be_part_of_a_key() -> None:
    assert SystemConfig(model_path=MODEL, http_port=8123).deployment_name.endswith("-8123")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_routers": 0}, "num_routers must be between 1 and"),
        ({"num_routers": 1000}, "num_routers must be between 1 and"),
        ({"redis_url": "http://x"}, "redis_url must start with"),
        (
            {"redis_url": "redis://:secret@h/0?decode_responses=yes"},
            "the option 'decode_responses'",
        ),
        ({"redis_url": "redis://:secret@h/0?socket_timeout=soon"}, "a wrong value: socket_timeout"),
        ({"redis_url": "unix:///tmp/s?socket_colour=red"}, "an unknown name"),
        ({"deployment": "a/b"}, "deployment must be"),
    ],
)
def test_wrong_settings_of_copies_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SystemConfig(model_path=MODEL, **changes)  # type: ignore[arg-type]
