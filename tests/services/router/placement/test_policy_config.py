from __future__ import annotations

import math

import pytest

from baton.core.errors import ConfigError
from services.router.placement.perf_config import PerfConfig
from services.router.placement.policy_config import PolicyConfig


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("temperature", -0.1, "between 0 and 10"),
        ("temperature", 11, "between 0 and 10"),
        ("slowdown_weight", math.nan, "between 0 and 100"),
        ("overlap_half_s", math.inf, "between 0 and 3600"),
        ("local_prefill_max_tokens", -1, "between 0 and"),
        ("shortage_factor", -1, "between 0 and 1000"),
        ("link_bytes_per_second", 0, "above 0"),
        ("disk_tier_bytes_per_second", math.nan, "above 0"),
        ("host_tier_bytes_per_second", math.inf, "above 0"),
        ("expected_output_tokens", 0, "positive"),
        ("min_offer_blocks", 0, "positive"),
        ("max_sessions", 0, "positive"),
    ],
)
def test_weight_out_of_range_is_refused_with_value_and_limit(name, value, limit):
    with pytest.raises(ConfigError, match=rf"policy\.{name}.*{limit}.*{value}"):
        PolicyConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefill_token_s", 0.0), ("itl_fixed_s", -1.0), ("prefill_pair_s", math.nan),
        ("memory", 9), ("outlier_ratio", 0.0),
    ],
)  # fmt: skip
def test_assumption_that_makes_no_sense_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"perf\.{name}.*{value:g}"):
        PerfConfig(**{name: value})
