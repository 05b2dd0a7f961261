"""Limits on tokens and the prompt's log-probabilities with two ranks: equal to those of one."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_llama
from baton.core.clock import ManualClock
from baton.core.structured import StructuredKind, StructuredSpec
from baton.engine.config import EngineConfig
from baton.engine.factory import build_engine
from gpu_harness import Output

END = (tiny_llama.END_TOKEN_ID,)
PROMPT = [(13 * i + 7) % 301 for i in range(40)]


def test_outputs_equal_those_of_one_rank(tmp_path: Path) -> None:
    """The vocabulary does not divide: the last rank's logits are padded."""
    folder = tiny_llama.write_checkpoint(
        tmp_path / "m", **tiny_llama.SHAPES["no_grouping_odd_widths"]
    )
    tiny_llama.write_byte_tokenizer(folder)
    spec = StructuredSpec(StructuredKind.REGEX, "[0-9]{3}-[a-f]{2}")
    outputs = []
    for tp_size in (1, 2):
        config = EngineConfig(
            model_path=folder,
            dtype="float32",
            tp_size=tp_size,
            num_threads=1,
            max_num_seqs=4,
            max_num_batched_tokens=24,
        )
        built = build_engine(config, clock=ManualClock())
        output = Output(built.engine)
        output.submit("shape", PROMPT[:9], eos=END, max_tokens=12, structured=spec, logprobs=1)
        output.submit("drawn", PROMPT[:4], eos=END, max_tokens=12, structured=spec, temperature=1.0)
        output.submit("words", PROMPT[:3], max_tokens=5, bad_words_ids=((7,), (8, 9)))
        output.submit("scored", PROMPT, max_tokens=3, prompt_logprobs=2)
        output.run()
        if built.ranks is not None:
            built.ranks.close()
        outputs.append(output)
    alone, group = outputs
    assert group.tokens == alone.tokens
    assert len(alone.tokens["shape"]) == len(alone.tokens["drawn"]) == 6
    for ours, theirs in zip(
        group.prompt_logprobs["scored"], alone.prompt_logprobs["scored"], strict=True
    ):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [t for t, _ in ours.top] == [t for t, _ in theirs.top]
