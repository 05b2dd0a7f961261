"""A real model on a CPU: requests move between engines and prefixes are fetched, byte for byte."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest

import tiny_llama
from baton.core.block import BlockId, chain_hashes, root_hash
from baton.core.clock import ManualClock
from baton.core.request import (
    FinishReason,
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    Work,
)
from baton.core.worker_info import Epoch, WorkerId
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine, StepOutput
from baton.engine.layers.linear import Linear
from baton.engine.model_runner import ModelRunner
from baton.engine.weights import LoadedModel, load_model

PEER = PeerRef(WorkerId("decode-0"), Epoch("e"), "127.0.0.1:1")
BLOCK_SIZE = 4
PROMPT = tuple((7 + i * i) % 320 for i in range(22))
NAME = RequestId("r")
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=24, temperature=0.0),
    "seeded": SamplingParams(max_tokens=24, temperature=1.3, top_p=0.9, seed=5),
    "by request id": SamplingParams(max_tokens=24, temperature=1.0, top_k=40),
    "penalties": SamplingParams(
        max_tokens=24,
        temperature=0.8,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        seed=1,
    ),
    "min_tokens": SamplingParams(
        max_tokens=24, temperature=0.0, min_tokens=20, stop_token_ids=tuple(range(0, 320, 2))
    ),
}


class Worker:
    """An engine over memory of its own."""

    def __init__(self, model: LoadedModel[Linear]) -> None:
        config = EngineConfig(model_path=Path("."), dtype="float32", block_size=BLOCK_SIZE)
        self.layout = model.layout(BLOCK_SIZE)
        self.memory = mmap.mmap(-1, 64 * self.layout.block_bytes)
        self.engine = Engine(
            config=config,
            layout=self.layout,
            num_blocks=64,
            max_model_len=model.max_model_len,
            runner=ModelRunner(model, config, self.layout, 64, memoryview(self.memory)),
            clock=ManualClock(),
            vocab_size=model.model_config.vocab_size,
        )
        self.hashes = chain_hashes(root_hash(self.layout.fingerprint), PROMPT, BLOCK_SIZE)
        self.tokens: list[int] = []
        self.chunks: list[Any] = []
        self.blocks: list[BlockId] = []
        self.finish_reason: FinishReason | None = None
        self.num_cached = 0

    def submit(self, work: Work, sampling: SamplingParams, known: tuple[int, ...] = ()) -> None:
        self.engine.submit(
            GenerateRequest(
                NAME,
                work,
                PROMPT,
                sampling,
                block_hashes=tuple(self.hashes),
                output_token_ids=known,
                kv_source=PEER if work.reads_all_kv else None,
            )
        )

    def step(self) -> StepOutput:
        output = self.engine.step()
        for delta in output.deltas:
            assert not delta.error
            self.tokens += delta.token_ids
            self.finish_reason = delta.finish_reason
            self.num_cached = delta.num_cached_tokens
        self.chunks += output.chunks
        for reservation in output.reservations:
            self.blocks = list(reservation.block_ids)
        self.engine.check_integrity()
        return output

    def run(self) -> list[int]:
        while self.engine.has_work:
            self.step()
        return self.tokens

    def read(self, owner: Worker, source: BlockId, target: BlockId) -> None:
        size = self.layout.block_bytes
        block = owner.memory[source * size : (source + 1) * size]
        self.memory[target * size : (target + 1) * size] = block


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel[Linear]:
    folder = tiny_llama.write_checkpoint(tmp_path_factory.mktemp("m") / "tiny")
    return load_model(EngineConfig(model_path=folder, dtype="float32"))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("num_before", [1, 3, 10])
def test_taken_over_request_gives_the_tokens_of_an_unbroken_one(
    model: LoadedModel[Linear], sampling: SamplingParams, num_before: int
) -> None:
    unbroken, owner, reader = (Worker(model) for _ in range(3))
    unbroken.submit(Work.GENERATE, sampling)
    expected = unbroken.run()
    owner.submit(Work.GENERATE, sampling)
    while len(owner.tokens) < num_before:
        owner.step()
    reader.submit(Work.TAKEOVER, sampling, tuple(owner.tokens))
    reader.step()
    owner.engine.start_handover(NAME, num_known_tokens=num_before)
    for _ in range(3):
        owner.step()
    owner.engine.freeze(NAME)
    owner.step()
    for chunk in owner.chunks:
        for index, source in enumerate(chunk.block_ids, start=chunk.first_block_index):
            reader.read(owner, source, reader.blocks[index])
    owner.engine.finish_handover(NAME)
    owner.step()
    assert owner.finish_reason is None
    reader.engine.activate(NAME, owner.chunks[-1].first_token)
    reader.run()
    assert owner.tokens + reader.tokens == expected
    assert reader.finish_reason is unbroken.finish_reason
    assert len(reader.tokens) > 0
    assert owner.engine.is_empty and reader.engine.is_empty


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_resumed_request_gives_the_tokens_of_an_unbroken_one(
    model: LoadedModel[Linear], sampling: SamplingParams
) -> None:
    unbroken, owner = Worker(model), Worker(model)
    unbroken.submit(Work.GENERATE, sampling)
    owner.submit(Work.GENERATE, sampling)
    for _ in range(4):
        owner.step()
        owner.engine.start_handover(NAME, num_known_tokens=0)
        owner.engine.freeze(NAME)
        owner.step()
        assert owner.chunks[-1].is_last
        owner.engine.release_lease(NAME)
        owner.engine.resume(NAME)
    assert owner.run() == unbroken.run()
    assert owner.engine.is_empty


def test_fetched_prefix_gives_the_tokens_of_a_computed_one(model: LoadedModel[Linear]) -> None:
    sampling = SAMPLINGS["greedy"]
    owner, reader = Worker(model), Worker(model)
    owner.submit(Work.GENERATE, sampling)
    expected = owner.run()
    leased = owner.engine.lease_prefix(RequestId("f"), owner.hashes)
    reservation = reader.engine.reserve_import(RequestId("f"), reader.hashes)
    assert reservation is not None
    for source, target in zip(leased, reservation.block_ids, strict=True):
        reader.read(owner, source, target)
    reader.engine.finish_import(RequestId("f"), num_blocks=len(leased))
    owner.engine.release_lease(RequestId("f"))
    reader.submit(Work.GENERATE, sampling)
    assert reader.run() == expected
    assert reader.num_cached == 20
    assert owner.engine.is_empty and reader.engine.is_empty
