from __future__ import annotations

import math

import pytest

from baton.core.errors import InvalidRequest
from baton.core.request import GenerateRequest, PeerRef, SamplingParams, Work

PEER = PeerRef("p0", "1", "h:1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be between 0 and 100, got -0.1"),
        ({"temperature": math.nan}, "temperature .* got nan"),
        ({"temperature": math.inf}, "temperature .* got inf"),
        ({"top_p": 0.0}, r"top_p must be between 0 \(exclusive\) and 1, got 0"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        (
            {"repetition_penalty": 1e-40},
            "repetition_penalty must be between 0.01 and 100, got 1e-40",
        ),
        ({"presence_penalty": 2.1}, "presence_penalty must be between -2 and 2"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20, got 21"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens must be between 0 and 5, got 6"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias must be between -100 and 100"),
        ({"stop_token_ids": tuple(range(257))}, "stop_token_ids takes at most 256"),
        ({"logit_bias": tuple((i, 0.0) for i in range(1025))}, "logit_bias takes at most 1024"),
    ],
)
def test_sampling_out_of_range_names_value_and_limit(values, message):
    with pytest.raises(InvalidRequest, match=message) as error:
        SamplingParams(**values)
    assert error.value.param in values or error.value.param == "min_tokens"


def test_limits_themselves_are_allowed():
    SamplingParams(
        max_tokens=1, temperature=0.0, top_p=1.0, min_p=1.0, presence_penalty=-2.0,
        frequency_penalty=2.0, seed=-(2**63), logprobs=20, min_tokens=1,
        logit_bias=((0, -100.0), (1, 100.0)),
    )  # fmt: skip


def test_greedy_and_penalties_are_recognised():
    assert SamplingParams(temperature=0.0).is_greedy
    assert SamplingParams(temperature=1e-40).is_greedy
    assert not SamplingParams(temperature=1e-5).is_greedy
    assert not SamplingParams().is_greedy
    assert not SamplingParams().has_penalties
    assert SamplingParams(repetition_penalty=1.1).has_penalties


def test_request_needs_a_prompt_and_a_source_where_all_kv_is_read():
    def request(work, peer, prompt=(1,)):
        return GenerateRequest("r", work, prompt, SamplingParams(), kv_source=peer)

    for work in Work:
        request(work, PEER)
    request(Work.PREFILL, None)
    request(Work.GENERATE, None)
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        request(Work.GENERATE, None, ())
    for work in (Work.DECODE, Work.TAKEOVER):
        with pytest.raises(InvalidRequest, match="needs a kv_source"):
            request(work, None)
