"""Sequences as samplers see them."""

from __future__ import annotations

from typing import Any

from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.engine.sequence import Sequence


def make_sequence(
    request_id: str = "r",
    *,
    prompt: tuple[int, ...] = (1, 2, 3),
    output: tuple[int, ...] = (),
    eos: tuple[int, ...] = (),
    **sampling: Any,
) -> Sequence:
    """Greedy unless told."""
    params = SamplingParams(**({"max_tokens": 100, "temperature": 0.0} | sampling))
    return Sequence(
        GenerateRequest(
            RequestId(request_id),
            Work.GENERATE,
            prompt,
            params,
            output_token_ids=output,
            eos_token_ids=eos,
        )
    )
