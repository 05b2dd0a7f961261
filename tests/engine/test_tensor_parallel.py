"""Several ranks compute what one rank computes: logits, KV, and tokens through the engine."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.block import BlockHash, chain_hashes
from baton.core.clock import ManualClock
from baton.core.errors import ConfigError
from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.factory import build_engine
from baton.engine.model_config import load_model_config
from baton.engine.tensor_parallel.limits import check_tp_size
from model_harness import ModelHarness
from rank_harness import GroupHarness
from tiny_llama import SHAPES, write_checkpoint

MODELS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "tied": {"tie_word_embeddings": True},
    "biases": SHAPES["biases"],
    "vocabulary that does not divide": SHAPES["no_grouping_odd_widths"],
    "three query heads a KV head": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
}
CASES = [(name, 2, "float32") for name in MODELS] + [
    ("grouped heads", 2, "bfloat16"),
    ("vocabulary that does not divide", 4, "float32"),
]
BLOCK_SIZE = 4
ROOT = BlockHash(bytes(16))
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.08}
"""Logits are of order one; the sums over ranks are the same in another order, and in bfloat16 each
partial sum is rounded."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: write_checkpoint(root / str(i), **changes)
        for i, (name, changes) in enumerate(MODELS.items())
    }


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def pair(
    request: pytest.FixtureRequest, folders: dict[str, Path]
) -> Iterator[tuple[ModelHarness, GroupHarness]]:
    """One rank, and a group, of the same model."""
    name, tp_size, dtype = request.param
    alone = ModelHarness(folders[name], dtype=dtype, block_size=4)
    group = GroupHarness(folders[name], tp_size=tp_size, dtype=dtype)
    yield alone, group
    group.close()


def test_logits_and_kv_of_mixed_chunks(pair: tuple[ModelHarness, GroupHarness]) -> None:
    """Twelve steps of whole prompts, chunks and single tokens in random company."""
    alone, group = pair
    tolerance = TOLERANCES[alone.layout.dtype]
    for harness in pair:
        harness.reset()
    rng = random.Random(5)
    prompts = [[rng.randrange(300) for _ in range(n)] for n in (1, 7, 30, 45)]
    mine, theirs = ([h.sequence(p, room=4) for p in prompts] for h in pair)
    for _ in range(12):
        left = [i for i, s in enumerate(mine) if s.num_computed_tokens < s.num_tokens]
        work = [(i, rng.randint(1, mine[i].num_tokens - mine[i].num_computed_tokens)) for i in left]
        if not work:
            break
        expected = alone.logits(*((mine[i], n) for i, n in work))
        found = group.logits(*((theirs[i], n) for i, n in work))
        for (i, _n), a, b in zip(work, expected, found, strict=True):
            assert (a is None) == (b is None)
            if a is None or b is None:
                continue
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
            for sequence in (mine[i], theirs[i]):
                if sequence.num_output_tokens < 3:
                    sequence.token_ids.append(int(a.argmax()))
    for mine_one, theirs_one in zip(mine, theirs, strict=True):
        tables = mine_one.block_table, theirs_one.block_table
        kv = [h.pool.blocks[table].float() for h, table in zip(pair, tables, strict=True)]
        assert kv[0].abs().sum() > 0
        torch.testing.assert_close(kv[0], kv[1], atol=tolerance, rtol=tolerance)


def test_step_ends_after_the_kv_of_all_ranks(tmp_path: Path) -> None:
    """A chunk that samples nothing has no sum behind its last layer, here the only one."""
    harness = GroupHarness(write_checkpoint(tmp_path, num_hidden_layers=1), tp_size=2)
    (rank,) = harness.group.pids
    sequence = harness.sequence(range(20))
    step = threading.Thread(target=harness.logits, args=((sequence, 8),))
    os.kill(rank, signal.SIGSTOP)
    step.start()
    step.join(0.3)
    assert step.is_alive()
    os.kill(rank, signal.SIGCONT)
    step.join(10)
    assert not step.is_alive()
    blocks = harness.pool.blocks[sequence.block_table[:2]]
    assert (blocks.flatten(2).abs().sum(-1) > 0).all()
    harness.close()


def make_engine(folder: Path, tp_size: int, **settings: Any) -> tuple[Engine, Any]:
    config = EngineConfig(
        model_path=folder, dtype="float32", tp_size=tp_size, num_threads=1, **settings
    )
    built = build_engine(config, clock=ManualClock())
    return built.engine, built.ranks


def generate(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy outputs of prompts that are submitted at once."""
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    outputs: dict[RequestId, list[int]] = {}
    for i, prompt in enumerate(prompts):
        request_id = RequestId(f"r{i}")
        outputs[request_id] = []
        hashes = chain_hashes(ROOT, prompt, BLOCK_SIZE)
        engine.submit(
            GenerateRequest(
                request_id, Work.GENERATE, tuple(prompt), sampling, block_hashes=tuple(hashes)
            )
        )
    while engine.has_work:
        for delta in engine.step().deltas:
            assert not delta.error
            outputs[delta.request_id] += delta.token_ids
    assert engine.is_empty
    engine.check_integrity()
    return list(outputs.values())


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> Iterator[tuple[Engine, Engine]]:
    """One rank and two, with pools of 24 blocks of 4 tokens and prompts in chunks of 16."""
    folder = folders["grouped heads"]
    layout_bytes = 24 * ModelHarness(folder, block_size=4).layout.block_bytes
    settings = {"block_size": BLOCK_SIZE, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    alone, _ = make_engine(folder, 1, kv_cache_bytes=layout_bytes, **settings)
    grouped, ranks = make_engine(folder, 2, kv_cache_bytes=layout_bytes // 2, **settings)
    yield alone, grouped
    ranks.close()


def test_engine_with_preemption_and_prefix_hits(engines: tuple[Engine, Engine]) -> None:
    rng = random.Random(9)
    prefix = [rng.randrange(300) for _ in range(12)]
    prompts = [prefix + [rng.randrange(300) for _ in range(n)] for n in (3, 9, 14, 20)]
    outputs = [generate(engine, prompts, 24) for engine in engines]
    assert outputs[0] == outputs[1]
    for engine in engines:
        assert engine.load().num_preemptions > 0
        assert engine.prefix_cache_stats.num_hit_tokens > 0


def test_ranks_with_a_pool_each_compute_the_same(
    folders: dict[str, Path], engines: tuple[Engine, Engine]
) -> None:
    """Also in the kernels' arithmetic of rows: a rank's blocks hold its own heads alone."""
    prompts = [[(3 * i + k) % 300 for i in range(n)] for k, n in enumerate((5, 17, 30))]
    grouped, ranks = make_engine(
        folders["grouped heads"],
        2,
        pool_per_rank=True,
        block_size=BLOCK_SIZE,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        kv_cache_bytes=1 << 18,
    )
    try:
        assert generate(grouped, prompts, 12) == generate(engines[0], prompts, 12)
    finally:
        ranks.close()


def test_sampled_tokens_are_those_of_one_rank(engines: tuple[Engine, Engine]) -> None:
    """Rank 0 alone samples, with the request's own random numbers."""
    sampling = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=4, ignore_eos=True)
    outputs = []
    for engine in engines:
        engine.submit(GenerateRequest(RequestId("s"), Work.GENERATE, (1, 2, 3), sampling))
        deltas = []
        while engine.has_work:
            deltas += engine.step().deltas
        outputs.append([t for d in deltas for t in d.token_ids])
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 12


@pytest.mark.parametrize(
    ("changes", "tp_size", "message"),
    [
        (
            {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 96},
            4,
            "tp_size 4 does not divide num_attention_heads 9; take 1 or 3",
        ),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 2},
            4,
            "tp_size 4 does not divide num_key_value_heads 2; take 1 or 2",
        ),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 100},
            8,
            "tp_size 8 does not divide intermediate_size 100; take 1, 2 or 4",
        ),
        (
            {"num_attention_heads": 7, "num_key_value_heads": 1},
            2,
            "tp_size 2 does not divide num_attention_heads 7; take 1",
        ),
    ],
)
def test_sizes_that_do_not_divide_the_model(
    tmp_path: Path, changes: dict[str, Any], tp_size: int, message: str
) -> None:
    folder = write_checkpoint(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        check_tp_size(load_model_config(folder), tp_size)
    with pytest.raises(ConfigError, match=message):
        make_engine(folder, tp_size)
