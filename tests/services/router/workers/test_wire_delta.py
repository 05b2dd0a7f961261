from __future__ import annotations

import random

from baton.core.lifecycle import LifecycleEvent, Timeline
from baton.core.request import FinishReason, RequestId, TokenDelta, TokenLogprobs
from baton.rpc import convert
from services.router.workers.wire_delta import delta_from_wire, is_last


def random_delta(rng: random.Random) -> TokenDelta:
    delta = TokenDelta(RequestId("r"), rng.randrange(9), rng.choices(range(99), k=rng.randrange(4)))
    delta.num_cached_tokens = rng.randrange(2)
    if rng.random() < 0.3:
        delta.logprobs = [TokenLogprobs(t, -0.5, ((t, -0.5),)) for t in delta.token_ids]
    if rng.random() < 0.3:
        delta.timeline = Timeline({LifecycleEvent.PREFILL_ENDED: 1.5})
    if rng.random() < 0.3:
        delta.finish_reason = rng.choice(list(FinishReason))
        delta.stop_token_id = rng.choice([None, 0, 7])
        delta.error = rng.choice(["", "out of memory"])
        delta.is_retryable, delta.is_overload = rng.random() < 0.5, rng.random() < 0.5
    return delta


def test_fast_conversion_equals_the_general_one() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        delta = random_delta(rng)
        message = convert.delta_to_wire(delta)
        assert delta_from_wire(message) == convert.delta_from_wire(message) == delta
        assert is_last(delta) == bool(delta.finish_reason or delta.timeline)
