"""The scenarios of `make sim`: equal in every process, and a broken bound has its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench.simulator_regression import SCENARIOS, Bound, Scenario, broken_bounds


def digests(hash_seed: str) -> dict[str, str]:
    command = [sys.executable, "-m", "bench.simulator_regression", "--size", "0.02", "--json"]
    environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, env=environ, capture_output=True, check=True, timeout=120)
    return {name: figures["digest"] for name, figures in json.loads(done.stdout).items()}


def test_equal_seeds_give_equal_runs_in_every_process() -> None:
    first = digests("1")
    assert set(first) == {"steady", "bursts", "overload"}
    assert digests("2") == first


def test_a_figure_out_of_its_bounds_is_named_with_them() -> None:
    scenario = Scenario("s", "", lambda size: {}, (Bound("hit_rate", 0.4, 0.5),))
    assert not broken_bounds(scenario, {"hit_rate": 0.45})
    assert broken_bounds(scenario, {"hit_rate": 0.3}) == [
        "hit_rate is 0.3, must be from 0.4 to 0.5"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_scenarios_stay_within_their_bounds(scenario: Scenario) -> None:
    assert not broken_bounds(scenario, scenario.run(1.0))
