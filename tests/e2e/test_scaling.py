"""Pools that grow and shrink under load: nobody who waits for tokens notices."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from baton.core.worker_info import Role
from made_up_worker import MODEL
from running_system import RunningSystem
from scaled_system import ScaledSystem, scaled_system
from services.planner.actuator import WorkerPhase
from services.planner.profile_file import profile_json
from services.router.edge.scrape_target import read_target
from tiny_llama import write_checkpoint, write_pair_tokenizer

STOP_LIMIT_S = 10.0
WAIT_S = 30.0
NUM_TOKENS = 2000
"""Long enough that a drain finds them under way."""
PROMPTS = [[(7 * i + 31 * k) % 256 for i in range(40 + k)] for k in range(6)]


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScaledSystem]:
    with scaled_system(tmp_path_factory.mktemp("scaled")) as scaled:
        yield scaled


def begin(scaled: ScaledSystem) -> list[asyncio.Task[str]]:
    return [asyncio.create_task(scaled.stream(p, NUM_TOKENS)) for p in PROMPTS]


async def until_both_decode(scaled: ScaledSystem, streams: list[asyncio.Task[str]]) -> None:
    """Returns when every decode worker has a request."""
    names = [name for name, role in scaled.ready().items() if role is Role.DECODE]
    while True:
        loads = await scaled.loads()
        if all(loads[name].num_running for name in names):
            return
        assert not all(stream.done() for stream in streams), f"nothing ran on one of {names}"
        await asyncio.sleep(0.02)


async def test_worker_that_comes_gets_requests_and_one_that_goes_loses_none(
    scaled: ScaledSystem,
) -> None:
    assert scaled.ready() == {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    unscaled = await asyncio.gather(*begin(scaled))
    scaled.pools.start(Role.DECODE)
    scaled.pools.start(Role.PREFILL)
    await scaled.wait_for(lambda: len(scaled.ready()) == 4)
    streams = begin(scaled)
    scaled.pools.drain("prefill-0")
    await until_both_decode(scaled, streams)
    scaled.pools.drain("decode-0")
    assert scaled.workers()["decode-0"].phase is WorkerPhase.DRAINING
    assert await asyncio.gather(*streams) == unscaled
    await scaled.wait_for(lambda: set(scaled.workers()) == {"prefill-1", "decode-1"})
    assert await scaled.metric('baton_migrations_total{reason="drain",result="moved"') > 0
    await scaled.assert_nothing_leaked()


@pytest.mark.slow
async def test_worker_goes_over_to_the_other_pool_and_comes_back_there_after_a_crash(
    scaled: ScaledSystem,
) -> None:
    unscaled = await asyncio.gather(*begin(scaled))
    before = scaled.ready()
    scaled.pools.start(Role.PREFILL)
    await scaled.wait_for(lambda: len(scaled.ready()) == 3)
    (name,) = scaled.ready().keys() - before.keys()
    streams = begin(scaled)
    scaled.pools.change_role(name, Role.DECODE)
    assert scaled.workers()[name].role is Role.DECODE
    await scaled.wait_for(lambda: scaled.ready().get(name) is Role.DECODE)
    assert await asyncio.gather(*streams) == unscaled
    child = scaled.supervisor.find(name)
    assert child is not None and child.process is not None
    child.process.kill()
    child.process.wait(10)
    await scaled.wait_for(lambda: scaled.workers()[name].phase is WorkerPhase.STARTING)
    await scaled.wait_for(lambda: scaled.ready().get(name) is Role.DECODE)
    assert await asyncio.gather(*begin(scaled)) == unscaled
    await scaled.assert_nothing_leaked()


def test_command_says_what_it_keeps_shows_its_decisions_and_stops_in_time(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    write_checkpoint(model)
    write_pair_tokenizer(model)
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(profile_json(MODEL, MODEL, kv_bytes_per_token=1, source="made")))
    settings = {"ttft_s": 1, "itl_s": 0.1, "profile": profile, "interval_s": 0.5}
    options = [f"--set=autoscale.{name}={value}" for name, value in settings.items()]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    arguments = ["--no-ray", "--autoscale", "--model", str(model), "--dtype", "float32", *options]
    system = RunningSystem(arguments, run_dir)
    try:
        system.start()
        shown = {}
        deadline = time.monotonic() + WAIT_S
        while "baton_planner_desired_workers{" not in shown.get("text", ""):
            assert time.monotonic() < deadline, system.output
            time.sleep(0.2)
            target = read_target(run_dir / "targets/planner.json")
            if target is not None:
                url = f"http://{target.address}/metrics"
                shown["text"] = httpx.get(url, timeout=10, trust_env=False).text
        assert "autoscaling: 1 to 8 prefill and 1 to 8 decode workers" in system.output
        assert "TTFT 1 s and ITL 0.1 s for 90 % of requests" in system.output
        (record, *_) = (run_dir / "decisions.jsonl").read_text().splitlines()
        assert json.loads(record)["seen"]["decode"]["num_ready"] == 1
        assert system.interrupt(20) < STOP_LIMIT_S
    finally:
        system.kill()
    assert system.leftovers() == []
    assert read_target(run_dir / "targets/planner.json") is None
