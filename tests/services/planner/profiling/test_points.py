"""What is measured of an engine stays within its limits."""

from __future__ import annotations

import pytest

from baton.core.errors import ConfigError
from services.planner.profiling.points import (
    GROWTH_TOKENS,
    BatchPoint,
    EngineLimits,
    PrefillPoint,
    choose_points,
)


@pytest.mark.parametrize(
    ("limits", "max_tokens"),
    [
        (EngineLimits(8192, 5824, 32, 128), 2000),
        (EngineLimits(131_072, 900_000, 256, 8192), 65_536),
        (EngineLimits(512, 600, 8, 64), 65_536),
        (EngineLimits(2048, 100_000, 1, 2048), 1000),
    ],
)
def test_every_point_fits(limits: EngineLimits, max_tokens: int) -> None:
    points = choose_points(limits, max_tokens=max_tokens)
    prompts = [p for p in points if isinstance(p, PrefillPoint)]
    batches = [p for p in points if isinstance(p, BatchPoint)]
    assert len(prompts) >= 3 and batches
    assert len({p.name for p in points}) == len(points)
    for prompt in prompts:
        assert prompt.num_tokens < limits.max_model_len
        assert prompt.num_tokens <= min(max_tokens, limits.max_kv_tokens)
    for batch in batches:
        assert batch.num_context_tokens + GROWTH_TOKENS <= limits.max_model_len
        sizes = batch.batch_sizes
        assert sizes[0] <= limits.max_num_seqs and sizes[-1] == 1
        assert list(sizes) == sorted(set(sizes), reverse=True)
        assert sizes[0] * (batch.num_context_tokens + GROWTH_TOKENS) <= limits.max_kv_tokens
        assert batch.num_tokens <= max_tokens


def test_no_room_is_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"holds 100 tokens.*raise engine\.kv_cache_bytes"):
        choose_points(EngineLimits(512, 100, 8, 64), max_tokens=1000)
