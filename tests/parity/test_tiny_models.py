"""Logits of tiny random checkpoints against transformers, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

TOLERANCE = 5e-5
"""Logits are of order one and both sides compute in float32 (relative step 6e-8). Sums over up to
480 products are taken in different orders and norm gains are multiplied in earlier here, which
together was seen to reach 5e-6; a wrong rotation or mask is off by more than 0.01."""


class Tiny:
    """Our model and, for one fixed sequence, the oracle's logits at every position."""

    def __init__(self, harness: Any, folder: Path) -> None:
        self.harness = harness
        vocab_size = harness.loaded.model_config.vocab_size
        generator = torch.Generator().manual_seed(5)
        self.token_ids = torch.randint(0, vocab_size, (150,), generator=generator).tolist()
        oracle = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.inference_mode():
            self.expected = oracle(torch.tensor([self.token_ids])).logits[0]

    def check(self, logits: torch.Tensor | None, num_tokens: int) -> None:
        """`logits` follow the first `num_tokens` tokens."""
        assert logits is not None
        torch.testing.assert_close(
            logits, self.expected[num_tokens - 1], atol=TOLERANCE, rtol=TOLERANCE
        )


@pytest.fixture(scope="module")
def tiny(make_harness: Callable[..., Any], tiny_dir: Path) -> Tiny:
    return Tiny(make_harness(tiny_dir, block_size=8), tiny_dir)


@pytest.fixture(autouse=True)
def fresh_blocks(tiny: Tiny) -> None:
    tiny.harness.reset()


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 37, 128, 150])
def test_whole_prompt_matches_oracle(tiny: Tiny, num_tokens: int) -> None:
    sequence = tiny.harness.sequence(tiny.token_ids[:num_tokens], room=1)
    (logits,) = tiny.harness.logits((sequence, num_tokens))
    tiny.check(logits, num_tokens)


def test_every_decode_step_matches_oracle(tiny: Tiny) -> None:
    sequence = tiny.harness.sequence(tiny.token_ids[:5], room=40)
    (logits,) = tiny.harness.logits((sequence, 5))
    for num_tokens in range(5, 40):
        tiny.check(logits, num_tokens)
        sequence.token_ids.append(tiny.token_ids[num_tokens])
        (logits,) = tiny.harness.logits((sequence, 1))


@pytest.mark.parametrize("chunks", [(1, 1, 148), (16, 16, 118), (7, 140, 3), (149, 1)])
def test_chunked_prompt_matches_oracle(tiny: Tiny, chunks: tuple[int, ...]) -> None:
    sequence = tiny.harness.sequence(tiny.token_ids, room=1)
    *earlier, last = chunks
    for size in earlier:
        assert tiny.harness.logits((sequence, size)) == [None]
    (logits,) = tiny.harness.logits((sequence, last))
    tiny.check(logits, 150)


def test_batched_with_other_work_matches_oracle(tiny: Tiny) -> None:
    """Decode steps of unlike lengths, a chunk over a cached prefix, and a whole prompt."""
    harness, lengths = tiny.harness, (3, 120, 9, 40, 24)
    decoding = [harness.sequence(tiny.token_ids[:n], room=2) for n in lengths]
    for sequence, n in zip(decoding, lengths, strict=True):
        harness.logits((sequence, n))
        sequence.token_ids.append(tiny.token_ids[n])
    chunked = harness.sequence(tiny.token_ids[:90], room=1)
    harness.logits((chunked, 33))
    partial = harness.sequence(tiny.token_ids[:60], room=1)
    whole = harness.sequence(tiny.token_ids[:21], room=1)
    work = [(decoding[0], 1), (chunked, 57), *((s, 1) for s in decoding[1:4])]
    results = harness.logits(*work, (partial, 10), (whole, 21), (decoding[4], 1))
    for logits, n in zip(results, (4, 90, 121, 10, 41, None, 21, 25), strict=True):
        if n is None:
            assert logits is None
        else:
            tiny.check(logits, n)


def test_stale_blocks_do_not_matter(tiny: Tiny) -> None:
    """Blocks are re-used with what another sequence left in them."""
    tiny.harness.pool.blocks.fill_(1e4)
    sequence = tiny.harness.sequence(tiny.token_ids[:21], room=3)
    (logits,) = tiny.harness.logits((sequence, 21))
    tiny.check(logits, 21)
    sequence.token_ids.append(tiny.token_ids[21])
    (logits,) = tiny.harness.logits((sequence, 1))
    tiny.check(logits, 22)
