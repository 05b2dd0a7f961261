"""Sampling against plain formulas, and the promise that a replay draws the same tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from baton.engine.sampler import Sampler, uniform
from baton.engine.sequence import Sequence
from sampling_sequences import make_sequence

VOCAB = 50


def logits_of(*rows: dict[int, float], low: float = -5.0) -> torch.Tensor:
    logits = torch.full((len(rows), VOCAB), low)
    for i, row in enumerate(rows):
        for token_id, value in row.items():
            logits[i, token_id] = value
    return logits


def sample(sequences: list[Sequence], logits: torch.Tensor) -> list[int]:
    return [t.token_id for t in Sampler(VOCAB).sample(sequences, logits)]


def draws(logits: torch.Tensor, num_draws: int, **sampling: Any) -> list[int]:
    """Tokens at positions 0.. of one request whose logits never change."""
    sequence = make_sequence(**({"temperature": 1.0, "seed": 1, "max_tokens": 10**6} | sampling))
    sampler, token_ids = Sampler(VOCAB), []
    for _ in range(num_draws):
        (result,) = sampler.sample([sequence], logits)
        token_ids.append(result.token_id)
        sequence.token_ids.append(result.token_id)
    return token_ids


def test_uniform_is_fixed_for_ever() -> None:
    """Workers of different versions must draw alike, so these values never change."""
    assert uniform(0, 0) == 0.8833108082136426
    values = [uniform(7, i) for i in range(20000)]
    assert all(0.0 <= v < 1.0 for v in values)
    # Standard errors: mean 0.002, each tenth 0.0021.
    assert abs(sum(values) / len(values) - 0.5) < 0.01
    for tenth in range(10):
        share = sum(tenth <= v * 10 < tenth + 1 for v in values) / len(values)
        assert abs(share - 0.1) < 0.01
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)
    assert uniform(1, 2) != uniform(2, 1)


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = logits_of({7: 2.0, 9: 2.0}, {49: 1.0}, {0: 3.0})
    sequences = [make_sequence(str(i)) for i in range(3)]
    assert sample(sequences, logits) == [7, 49, 0]
    assert sample(sequences, logits.bfloat16()) == [7, 49, 0]


def test_mixed_batch_equals_each_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, VOCAB) * 3
    sequences = [
        make_sequence("a"),
        make_sequence("b", temperature=1.0, seed=3),
        make_sequence("c", repetition_penalty=1.5),
        make_sequence("d", temperature=0.7, top_k=5),
        make_sequence("e", temperature=2.0, top_p=0.5, output=(4, 4)),
        make_sequence("f", temperature=1.0, min_p=0.2, frequency_penalty=1.0, output=(9,)),
        make_sequence("g", logit_bias=((11, 100.0),)),
    ]
    before = logits.clone()
    together = sample(sequences, logits)
    assert together == [sample([s], logits[i : i + 1])[0] for i, s in enumerate(sequences)]
    assert together[6] == 11
    assert torch.equal(logits, before)


def test_replay_continues_with_the_same_draws() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, VOCAB)
    sampling = {"temperature": 1.0, "seed": 42}
    whole = draws(logits, 20, **sampling)
    replayed = make_sequence(output=tuple(whole[:12]), **sampling)
    assert sample([replayed], logits) == [whole[12]]
    unseeded = {"temperature": 1.0, "seed": None}
    assert draws(logits, 20, **unseeded) == draws(logits, 20, **unseeded)
    other = make_sequence("other", **unseeded)
    same = make_sequence("r", **unseeded)
    drawn = [Sampler(VOCAB).sample([s], torch.zeros(1, VOCAB))[0].token_id for s in (same, other)]
    assert drawn[0] != drawn[1]


def test_draws_follow_the_distribution() -> None:
    logits = logits_of({3: math.log(0.5), 17: math.log(0.3), 40: math.log(0.2)}, low=-1e9)
    token_ids = draws(logits, 6000)
    # Standard error of a share of one half over 6,000 draws: 0.0065.
    for token_id, share in ((3, 0.5), (17, 0.3), (40, 0.2)):
        assert abs(token_ids.count(token_id) / 6000 - share) < 0.03


def test_temperature_sharpens() -> None:
    logits = logits_of({3: 1.0, 4: 0.0}, low=-1e9)
    share = draws(logits, 2000, temperature=0.5).count(3) / 2000
    assert abs(share - 1 / (1 + math.exp(-2.0))) < 0.04
    assert set(draws(logits, 50, temperature=1e-4)) == {3}


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({"top_k": 1}, {5}),
        ({"top_k": 2}, {5, 6}),
        ({"top_k": 3}, {5, 6, 7, 8}),
        ({"top_k": 500}, {5, 6, 7, 8, 9}),
        ({"top_p": 0.39}, {5}),
        ({"top_p": 0.41}, {5, 6}),
        ({"top_p": 0.65}, {5, 6, 7, 8}),
        ({"min_p": 0.3}, {5, 6, 7, 8}),
        ({"min_p": 0.6}, {5, 6}),
        ({"min_p": 1.0}, {5}),
        ({"top_k": 2, "top_p": 0.61}, {5}),
        ({"top_k": 2, "top_p": 0.62}, {5, 6}),
    ],
)
def test_filters_keep_exactly(sampling: dict[str, Any], allowed: set[int]) -> None:
    """Probabilities 0.4, 0.25, 0.15 and 0.15 (a tie), 0.05."""
    shares = {5: 0.4, 6: 0.25, 7: 0.15, 8: 0.15, 9: 0.05}
    logits = logits_of({t: math.log(p) for t, p in shares.items()}, low=-1e9)
    assert set(draws(logits, 400, **sampling)) == allowed


def test_top_p_beyond_the_first_candidates() -> None:
    """Mass spread over more tokens than the quick look covers still ends at the right one."""
    vocab_size = 5000
    logits = torch.zeros(1, vocab_size) - torch.arange(vocab_size) * 1e-6
    sequence = make_sequence(temperature=1.0, top_p=0.5, max_tokens=10**6)
    sampler, largest = Sampler(vocab_size), 0
    for _ in range(300):
        (result,) = sampler.sample([sequence], logits)
        sequence.token_ids.append(result.token_id)
        largest = max(largest, result.token_id)
    assert 2300 < largest < 2500


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_extreme_logits_and_temperatures_draw_likely_tokens(top_p: float) -> None:
    for high, temperature in ((30.0, 1e-40), (1e37, 1e-5), (3e38, 0.5), (3e38, 1e-5)):
        logits = logits_of({3: high}, low=-high)
        assert set(draws(logits, 20, temperature=temperature, top_p=top_p)) == {3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_on_extreme_logits_stay_finite(temperature: float) -> None:
    logits = logits_of({1: 3e38, 2: 2e38}, low=-3e38)
    sequence = make_sequence(
        prompt=(1, 4), temperature=temperature, seed=1, repetition_penalty=0.01
    )
    assert sample([sequence], logits) == [1]


def test_stop_tokens_that_cover_the_vocabulary_leave_a_draw() -> None:
    seen = set()
    for seed in range(20):
        sequence = make_sequence(
            temperature=1.0, seed=seed, min_tokens=5, stop_token_ids=tuple(range(VOCAB))
        )
        seen.update(sample([sequence], torch.zeros(1, VOCAB)))
    assert len(seen) > 5


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = logits_of({1: 3.0, 20: 2.9, 30: 2.0, 31: -1.0})
    sequence = make_sequence(prompt=(1,), output=(20,), repetition_penalty=2.0)
    assert sample([sequence], logits) == [30]
    negative = logits_of({1: -1.0, 31: -1.5}, low=-9.0)
    assert sample([sequence], negative) == [31]


def test_presence_and_frequency_count_output_alone() -> None:
    logits = logits_of({1: 3.0, 20: 2.9, 30: 2.0})
    presence = make_sequence(prompt=(1,), output=(20,), presence_penalty=2.0)
    assert sample([presence], logits) == [1]
    logits = logits_of({20: 3.0, 30: 2.0})
    once = make_sequence(output=(20,), frequency_penalty=0.6)
    twice = make_sequence(output=(20, 20), frequency_penalty=0.6)
    assert sample([once, twice], torch.cat((logits, logits))) == [20, 30]


def test_counts_grow_with_the_sequence_and_survive_skipped_steps() -> None:
    """A long penalised run equals one that is counted afresh at every step."""
    torch.manual_seed(0)
    kept, logits = Sampler(600), torch.randn(1, 600)
    sampling = {"frequency_penalty": 0.3, "repetition_penalty": 1.1, "max_tokens": 1000}
    sequence = make_sequence(prompt=tuple(range(500)), **sampling)
    other = make_sequence("other", prompt=(1,), **sampling)
    for step in range(60):
        if step % 7 == 3:
            kept.sample([other], logits)
            sequence.token_ids.append(step)
            continue
        (result,) = kept.sample([sequence], logits)
        (fresh,) = Sampler(600).sample([sequence], logits)
        assert result == fresh
        sequence.token_ids.append(result.token_id)
    del sequence.token_ids[505:]
    assert kept.sample([sequence], logits) == Sampler(600).sample([sequence], logits)


def test_counts_belong_to_a_sequence_and_not_to_its_id() -> None:
    """An id that has ended may come back for another sequence in the very next step."""
    sampler = Sampler(VOCAB)
    logits = logits_of({4: 2.0, 7: 1.9})
    first = make_sequence("same", prompt=(4, 4, 4), repetition_penalty=2.0)
    (token,) = sampler.sample([first], logits)
    assert token.token_id == 7
    second = make_sequence("same", prompt=(7, 1, 1), repetition_penalty=2.0)
    (token,) = sampler.sample([second], logits)
    assert token.token_id == 4


def test_logit_bias_moves_and_bans() -> None:
    logits = logits_of({7: 2.0, 8: 1.0})
    assert sample([make_sequence(logit_bias=((8, 1.5),))], logits) == [8]
    assert sample([make_sequence(logit_bias=((7, -100.0), (VOCAB + 5, 9.0)))], logits) == [8]


def test_stops_are_masked_before_min_tokens_alone() -> None:
    logits = logits_of({7: 3.0, 8: 2.0, 9: 1.0})
    fields = {"eos": (7,), "stop_token_ids": (8,), "min_tokens": 2}
    assert sample([make_sequence(**fields)], logits) == [9]
    assert sample([make_sequence(output=(1,), **fields)], logits) == [9]
    assert sample([make_sequence(output=(1, 1), **fields)], logits) == [7]
    assert sample([make_sequence(ignore_eos=True, **fields)], logits) == [7]


def test_logprobs_are_of_the_raw_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB)
    expected = torch.log_softmax(logits.double(), dim=-1)
    sequences = [
        make_sequence("a", logprobs=0),
        make_sequence("b"),
        make_sequence("c", logprobs=3, temperature=0.1, logit_bias=((4, 100.0),)),
    ]
    first, second, third = Sampler(VOCAB).sample(sequences, logits)
    assert second.logprobs is None
    assert first.logprobs is not None and first.logprobs.top == ()
    assert first.logprobs.token_id == first.token_id
    assert first.logprobs.logprob == pytest.approx(float(expected[0, first.token_id]), abs=1e-5)
    assert third.token_id == 4
    assert third.logprobs is not None
    assert third.logprobs.logprob == pytest.approx(float(expected[2, 4]), abs=1e-5)
    best = expected[2].topk(3)
    assert [t for t, _ in third.logprobs.top] == best.indices.tolist()
    assert [p for _, p in third.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)
