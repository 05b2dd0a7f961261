"""Greedy outputs of a model through the engine, and how far they agree with another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.core.block import chain_hashes, root_hash
from baton.core.clock import WallClock
from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.layers.linear import Linear
from baton.engine.model_runner import ModelRunner
from baton.engine.weights import LoadedModel

MAX_TOKENS = 64
NUM_BLOCKS = 500


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over prompts, of outputs against a reference of at most MAX_TOKENS tokens each."""

    equal_tokens: float
    """Share of the reference's tokens that stand at the same place of the output."""
    matched_prefix: float
    """Mean share of a reference before the first difference."""
    identical_outputs: float
    """Share of prompts with the whole reference."""


def generate(
    model: LoadedModel[Linear],
    prompts: Mapping[str, Sequence[int]],
    eos_token_ids: tuple[int, ...],
) -> dict[str, list[int]]:
    """Name -> output tokens without the one that ends them."""
    config = EngineConfig(model_path=Path("."), dtype=model.dtype)
    layout = model.layout(config.block_size)
    engine = Engine(
        config=config,
        layout=layout,
        num_blocks=NUM_BLOCKS,
        max_model_len=model.max_model_len,
        runner=ModelRunner(model, config, layout, NUM_BLOCKS),
        clock=WallClock(),
        vocab_size=model.model_config.vocab_size,
    )
    root = root_hash(layout.fingerprint)
    for name, prompt in prompts.items():
        engine.submit(
            GenerateRequest(
                RequestId(name),
                Work.GENERATE,
                tuple(prompt),
                SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0),
                block_hashes=tuple(chain_hashes(root, tuple(prompt), layout.block_size)),
                eos_token_ids=eos_token_ids,
            )
        )
    outputs: dict[str, list[int]] = {name: [] for name in prompts}
    while engine.has_work:
        for delta in engine.step().deltas:
            outputs[delta.request_id].extend(delta.token_ids)
    return outputs


def agreement(
    outputs: Mapping[str, Sequence[int]], references: Mapping[str, Sequence[int]]
) -> Agreement:
    equal = total = identical = 0
    prefixes = []
    for name, reference in references.items():
        output = outputs[name]
        matches = [a == b for a, b in zip(output, reference, strict=False)]
        matches += [False] * (len(reference) - len(matches))
        equal += sum(matches)
        total += len(reference)
        first = matches.index(False) if False in matches else len(reference)
        prefixes.append(first / len(reference) if reference else 1.0)
        identical += first == len(reference)
    return Agreement(equal / total, sum(prefixes) / len(prefixes), identical / len(references))
