from __future__ import annotations

import random

from baton.core.request import FinishReason, RequestId, TokenDelta, TokenLogprobs
from services.router.requests.token_stream import TokenStream


def delta(first, ids, finish=None):
    return TokenDelta(
        "r", first, list(ids), [TokenLogprobs(i, 0.0) for i in ids], finish_reason=finish
    )


def test_early_delta_waits_for_what_precedes_it():
    stream = TokenStream()
    assert stream.push(delta(1, [11])).token_ids == []
    assert stream.push(delta(2, [12], FinishReason.LENGTH)).finish_reason is None
    assert stream.is_waiting
    new = stream.push(delta(0, [10]))
    assert new.token_ids == [10, 11, 12] and new.finish_reason is FinishReason.LENGTH
    assert not stream.is_waiting


def test_repeated_tokens_are_trimmed_with_their_logprobs():
    stream = TokenStream()
    stream.push(delta(0, [1, 2, 3]))
    new = stream.push(delta(1, [2, 3, 4, 5]))
    assert new.token_ids == [4, 5] and [e.token_id for e in new.logprobs] == [4, 5]
    assert stream.push(delta(0, [1, 2])).token_ids == []
    assert stream.token_ids == [1, 2, 3, 4, 5]


def test_end_without_tokens_is_seen():
    stream = TokenStream()
    stream.push(delta(0, [1]))
    assert stream.push(delta(1, [], FinishReason.STOP)).finish_reason is FinishReason.STOP


def test_restart_voids_what_waits():
    stream = TokenStream()
    stream.push(delta(0, [1]))
    stream.push(delta(5, [9]))
    stream.restart()
    assert not stream.is_waiting
    assert stream.push(delta(1, [2])).token_ids == [2]


def test_any_order_and_overlap_gives_every_token_once():
    rng = random.Random(0)
    for _ in range(1500):
        ids = [rng.randrange(100) for _ in range(rng.randrange(1, 12))]
        n = len(ids)
        parts = [delta(i, ids[i : i + 1]) for i in range(n)]
        for _ in range(rng.randrange(4)):
            start = rng.randrange(n)
            parts.append(delta(start, ids[start : start + rng.randrange(4)]))
        rng.shuffle(parts)
        stream = TokenStream()
        seen = []
        for part in parts:
            new = stream.push(part)
            assert [e.token_id for e in new.logprobs] == new.token_ids
            seen += new.token_ids
        assert seen == stream.token_ids == ids
        assert not stream.is_waiting


def test_scores_of_the_prompt_are_handed_on_once():
    stream = TokenStream()
    scores = (TokenLogprobs(5, -0.5),)
    early = TokenDelta(RequestId("r"), first_index=1, token_ids=[8])
    first = TokenDelta(RequestId("r"), token_ids=[7], prompt_logprobs=scores)
    assert not stream.push(early).prompt_logprobs
    assert stream.push(first).prompt_logprobs == scores
    # A replay that begins anew says it again.
    assert not stream.push(first).prompt_logprobs
