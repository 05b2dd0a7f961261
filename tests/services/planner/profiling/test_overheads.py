"""What a live system adds to steps, found again from requests made up with it."""

from __future__ import annotations

import dataclasses

import pytest

from baton.core.errors import ConfigError
from made_up_worker import HARDWARE
from services.planner.profiling.overheads import (
    LiveSeen,
    PromptSeen,
    StreamsSeen,
    decode_s,
    find_overheads,
    prompt_s,
)

STEP_TOKENS, KV_BYTES = 512, 1000
REAL = dataclasses.replace(
    HARDWARE, step_gap_s=0.003, link_bytes_per_second=1e8, link_latency_s=0.004
)
TOLD_S = 0.0005
REQUEST_S, REQUEST_TOKEN_S, PREFILL_SHARE, DECODE_SHARE = 0.005, 2e-6, 0.4, 0.7


def prompt(num_tokens: int, *, has_neighbour: bool = False) -> PromptSeen:
    slow = 1 + PREFILL_SHARE * has_neighbour
    outside_s = REQUEST_S + REQUEST_TOKEN_S * num_tokens
    ttft_s = slow * prompt_s(REAL, num_tokens, STEP_TOKENS) + outside_s
    return PromptSeen(num_tokens, ttft_s, has_neighbour)


def stream(size: int, *, has_neighbour: bool = False) -> StreamsSeen:
    step_s = decode_s(REAL, size, 80.0) + TOLD_S * size
    handoff_s = step_s - REAL.step_gap_s + 0.004 + 64 * KV_BYTES / 1e8 if size == 1 else None
    return StreamsSeen(
        size, 64, handoff_s, step_s * (1 + DECODE_SHARE * has_neighbour), 80.0, has_neighbour
    )


def seen(*, disturbed: bool = False) -> LiveSeen:
    prompts = [prompt(n) for n in (64, 256, 1024)] * 3
    prompts += [prompt(512, has_neighbour=True)] * 3
    streams = [stream(1), stream(4), stream(1, has_neighbour=True)] * 3
    if disturbed:
        prompts[0] = dataclasses.replace(prompts[0], ttft_s=9.0)
        streams[0] = dataclasses.replace(streams[0], itl_s=9.0, handoff_s=9.0)
    return LiveSeen(prompts, streams, {"prefill": 3.0, "decode": 3.0}, 1e8)


@pytest.mark.parametrize("disturbed", [False, True])
def test_what_was_added_is_found(disturbed: bool) -> None:
    steps = dataclasses.replace(REAL, step_gap_s=0.0)
    found = find_overheads(
        seen(disturbed=disturbed), steps, steps, step_tokens=STEP_TOKENS, kv_bytes=KV_BYTES
    )
    assert found.step_gap_s == pytest.approx(0.003)
    assert found.told_sequence_s == pytest.approx(TOLD_S)
    assert found.request_s == pytest.approx(REQUEST_S, rel=0.01)
    assert found.request_token_s == pytest.approx(REQUEST_TOKEN_S, rel=0.05)
    assert found.link_latency_s == pytest.approx(0.004)
    assert found.prefill_neighbour_share == pytest.approx(PREFILL_SHARE, rel=0.01)
    assert found.decode_neighbour_share == pytest.approx(DECODE_SHARE, rel=0.01)


def test_steps_fitted_too_long_leave_nothing_negative() -> None:
    slow = dataclasses.replace(REAL, step_fixed_s=1.0, step_gap_s=0.0)
    found = find_overheads(seen(), slow, slow, step_tokens=STEP_TOKENS, kv_bytes=KV_BYTES)
    assert min(dataclasses.astuple(found)) >= 0


def test_nothing_seen_is_refused() -> None:
    with pytest.raises(ConfigError, match="answered no request on its own"):
        find_overheads(LiveSeen([], [], {}, None), REAL, REAL, step_tokens=512, kv_bytes=1000)
