"""Limits on tokens and prompts' log-probabilities on the GPU engine, whose steps run ahead of what
the host knows: equal to the CPU engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny_llama
from baton.core.clock import WallClock
from baton.core.structured import StructuredKind, StructuredSpec
from baton.engine.config import EngineConfig
from baton.engine.factory import build_engine
from baton.engine.gpu.device import ComputeDevice
from baton.engine.grammar.compiler import GrammarCompiler
from baton.engine.grammar.vocabulary import grammar_tokenizer
from baton.engine.tokenizer import Tokenizer
from gpu_harness import Output, gpu_engine

TINY: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "max_position_embeddings": 128,
}
END = (tiny_llama.END_TOKEN_ID,)
PROMPT = [7, 99, 3, 250, 12, 66, 201]


def submit_all(output: Output) -> None:
    number = StructuredSpec(StructuredKind.REGEX, "[0-9]-[a-z]")
    choice = StructuredSpec.of_choices(("yes", "no"))
    output.submit("number", PROMPT[:3], eos=END, max_tokens=5, structured=number, logprobs=2)
    output.submit(
        "choice", PROMPT[:2], eos=END, max_tokens=4, structured=choice, temperature=1.0, seed=4
    )
    output.submit(
        "words", PROMPT[:4], max_tokens=3, bad_words_ids=((9,), (3, 3)), allowed_token_ids=(3, 9, 4)
    )
    output.submit("scored", PROMPT, max_tokens=1, prompt_logprobs=2, logprobs=0)
    output.submit("cut", PROMPT[:5], eos=END, max_tokens=2, structured=number, temperature=0.7)


def test_outputs_equal_those_of_the_cpu_engine(
    tmp_path: Path, compute_device: ComputeDevice
) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m", **TINY)
    tiny_llama.write_byte_tokenizer(folder)
    config = EngineConfig(
        model_path=folder,
        dtype="float32",
        max_num_seqs=3,
        max_num_batched_tokens=5,
        kv_cache_bytes=1 << 19,
        num_threads=1,
    )
    grammars = GrammarCompiler(lambda: grammar_tokenizer(Tokenizer.from_folder(folder), 264))
    expected = Output(build_engine(config, clock=WallClock()).engine)
    actual = Output(gpu_engine(config, compute_device, grammars))
    for output in (expected, actual):
        submit_all(output)
        output.run()
    assert actual.tokens == expected.tokens
    assert bytes(actual.tokens["choice"]) in (b"yes", b"no")
    assert len(actual.tokens["number"]) == 3 and len(actual.tokens["cut"]) == 2
    for kind in ("logprobs", "prompt_logprobs"):
        ours, theirs = getattr(actual, kind), getattr(expected, kind)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert [e.token_id for e in ours[name]] == [e.token_id for e in theirs[name]]
            for a, b in zip(ours[name], theirs[name], strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
                assert [t for t, _ in a.top] == [t for t, _ in b.top]
    assert len(actual.prompt_logprobs["scored"]) == len(PROMPT) - 1
