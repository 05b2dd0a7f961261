"""The suite can see what it looks for."""

from __future__ import annotations

import random

import pytest

pytestmark = pytest.mark.chaos


def test_one_wrong_block_changes_the_tokens(reference) -> None:
    rng = random.Random(1)
    num_seen = 0
    for index in range(10):
        prompt = reference.prompt(index, 300, 20)
        first = rng.randrange(18) * 16
        spoilt = [*prompt[:first], *(rng.randrange(256) for _ in range(16)), *prompt[first + 16 :]]
        num_seen += reference._generate(tuple(spoilt), 20) != reference.tokens(prompt, 20)
    assert num_seen >= 9
