"""Greedy outputs of the real model through the engine: every road to a token gives the same one.

Colocated, chunked by the step's budget, launched ahead, from the prefix cache, under preemption,
and handed over between two engines block by block, against recorded transformers outputs.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from baton.core.block import BlockId, chain_hashes, root_hash
from baton.core.clock import WallClock
from baton.core.kv_layout import KvLayout
from baton.core.request import (
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    TokenDelta,
    Work,
)
from baton.core.worker_info import Epoch, WorkerId
from baton.engine.batch import Runner
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine, StepOutput
from baton.engine.model_runner import ModelRunner
from baton.engine.weights import LoadedModel, load_model

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

EOS = (2,)
PEER = PeerRef(WorkerId("prefill-0"), Epoch("e"), "127.0.0.1:1")
NUM_BLOCKS = 400


class Worker:
    """An engine over memory of its own, and what it has emitted."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        num_blocks: int = NUM_BLOCKS,
        wrap: Callable[[Runner], Runner] = lambda runner: runner,
        **settings: int,
    ):
        config = EngineConfig(model_path=Path("."), dtype="float32", **settings)
        self.layout: KvLayout = model.layout(config.block_size)
        self.memory = mmap.mmap(-1, num_blocks * self.layout.block_bytes)
        runner = ModelRunner(model, config, self.layout, num_blocks, memoryview(self.memory))
        self.engine = Engine(
            config=config,
            layout=self.layout,
            num_blocks=num_blocks,
            max_model_len=model.max_model_len,
            runner=wrap(runner),
            clock=WallClock(),
            vocab_size=model.model_config.vocab_size,
        )
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, TokenDelta] = {}

    def submit(self, item: dict[str, Any], work: Work = Work.GENERATE, tag: str = "") -> str:
        name = item["name"] + tag
        prompt = tuple(item["prompt_token_ids"])
        root = root_hash(self.layout.fingerprint)
        request = GenerateRequest(
            RequestId(name),
            work,
            prompt,
            SamplingParams(max_tokens=64, temperature=0.0),
            block_hashes=tuple(chain_hashes(root, prompt, self.layout.block_size)),
            eos_token_ids=EOS,
            kv_source=PEER if work is Work.DECODE else None,
        )
        self.engine.submit(request)
        return name

    def step(self) -> StepOutput:
        output = self.engine.step()
        for delta in output.deltas:
            assert not delta.error
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            self.last[delta.request_id] = delta
        return output

    def run(self) -> None:
        while self.engine.has_work:
            self.step()

    def block(self, block_id: BlockId) -> slice:
        size = self.layout.block_bytes
        return slice(block_id * size, (block_id + 1) * size)


@pytest.fixture(scope="module")
def model(smollm2_float32_dir: Path) -> LoadedModel:
    return load_model(EngineConfig(model_path=smollm2_float32_dir, dtype="float32"))


def outputs(item: dict[str, Any], stops: bool) -> list[int]:
    """The recorded output holds the stop token; a delta names it apart."""
    expected: list[int] = item["output_token_ids"]
    return expected[:-1] if stops and expected[-1] in EOS else expected


def check(worker: Worker, items: list[dict[str, Any]], tag: str = "") -> None:
    for item in items:
        assert worker.tokens[item["name"] + tag] == outputs(item, stops=True), item["name"]
    worker.engine.check_integrity()
    assert worker.engine.is_empty


@pytest.mark.parametrize(("budget", "is_ahead"), [(512, False), (33, False), (33, True)])
def test_colocated_batch_with_chunks(
    model: LoadedModel,
    golden_items: list[dict[str, Any]],
    deferred_runner: ModuleType,
    budget: int,
    is_ahead: bool,
) -> None:
    items = [i for i in golden_items if budget == 512 or len(i["prompt_token_ids"]) < 100]
    wrap = deferred_runner.DeferredRunner if is_ahead else lambda runner: runner
    worker = Worker(model, max_num_seqs=16, max_num_batched_tokens=budget, wrap=wrap)
    for item in items:
        worker.submit(item)
    worker.run()
    check(worker, items)


def test_prefix_cache_hit(model: LoadedModel, golden_items: list[dict[str, Any]]) -> None:
    items = [i for i in golden_items if len(i["prompt_token_ids"]) > 16]
    worker = Worker(model)
    for tag in ("", " again"):
        for item in items:
            worker.submit(item, tag=tag)
        worker.run()
    for item in items:
        num_prompt_tokens = len(item["prompt_token_ids"])
        num_cached_tokens = worker.last[item["name"] + " again"].num_cached_tokens
        assert num_cached_tokens == (num_prompt_tokens - 1) // 16 * 16
    check(worker, items)
    check(worker, items, " again")


def test_preempted_sequences_recompute_the_same(
    model: LoadedModel, golden_items: list[dict[str, Any]]
) -> None:
    items = [i for i in golden_items if len(i["prompt_token_ids"]) < 100]
    worker = Worker(model, num_blocks=30)
    for item in items:
        worker.submit(item)
    worker.run()
    assert worker.engine.load().num_preemptions > 0
    check(worker, items)


def test_disaggregated(model: LoadedModel, golden_items: list[dict[str, Any]]) -> None:
    """Blocks move as bytes after each chunk, to other places in the other pool."""
    prefill = Worker(model, max_num_batched_tokens=256)
    decode = Worker(model, num_blocks=NUM_BLOCKS - 50)
    for item in golden_items:
        prefill.submit(item, Work.PREFILL)
        decode.submit(item, Work.DECODE)
    targets: dict[str, list[BlockId]] = {}
    while decode.engine.has_work or prefill.engine.has_work:
        for reservation in decode.step().reservations:
            targets[reservation.request_id] = list(reservation.block_ids)
        for chunk in prefill.step().chunks:
            own = targets[chunk.request_id][chunk.first_block_index :]
            for source, target in zip(chunk.block_ids, own, strict=False):
                decode.memory[decode.block(target)] = prefill.memory[prefill.block(source)]
            if not chunk.is_last:
                continue
            assert chunk.first_token is not None
            decode.tokens[chunk.request_id] = list(prefill.tokens[chunk.request_id])
            decode.engine.activate(chunk.request_id, chunk.first_token)
            prefill.engine.release_lease(chunk.request_id)
    check(decode, golden_items)
    prefill.engine.check_integrity()
    assert prefill.engine.is_empty
