"""Targets that nothing keeps are named, with what could be kept."""

from __future__ import annotations

import dataclasses

from made_up_worker import MODEL
from services.planner.autoscale_config import AutoscaleConfig
from services.planner.decision_record import Models
from services.planner.reachable import out_of_reach

CONFIG = AutoscaleConfig(ttft_s=0.4, itl_s=0.04)
MODELS = Models(MODEL, MODEL)


def test_targets_that_one_request_alone_keeps_are_nothing_to_tell() -> None:
    assert out_of_reach(CONFIG, MODELS) == []


def test_targets_below_the_step_of_one_request_are_told_with_the_least_that_can_be_kept() -> None:
    both = dataclasses.replace(CONFIG, ttft_s=0.01, itl_s=0.001)
    ttft, itl = out_of_reach(both, MODELS)
    assert "autoscale.ttft_s is 0.01, and the shortest prompt takes 0.0202 s" in ttft
    assert "autoscale.itl_s is 0.001, and a decode step of one sequence takes 0.0204 s" in itl
    assert "no number of workers keeps it" in itl and "Ask for more than 0.0204" in itl
    least = dataclasses.replace(CONFIG, ttft_s=0.021, itl_s=0.021)
    assert out_of_reach(least, MODELS) == []
