"""A request that moves between two GPU engines, with steps launched ahead on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import tiny_llama
from baton.core.clock import WallClock
from baton.core.request import GenerateRequest, PeerRef, RequestId, SamplingParams, Work
from baton.core.worker_info import Epoch, WorkerId
from baton.engine.communicator import SingleCommunicator
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine, StepOutput
from baton.engine.gpu.build import build_gpu_rank
from baton.engine.gpu.device import ComputeDevice

PEER = PeerRef(WorkerId("decode-0"), Epoch("e"), "127.0.0.1:1")
NAME = RequestId("r")
PROMPT = tuple((7 + i * i) % 48 for i in range(9))
NUM_SCRATCH_BLOCKS = 3


class Worker:
    """A GPU engine, its pool, and the tokens it has told."""

    def __init__(self, config: EngineConfig, device: ComputeDevice) -> None:
        rank = build_gpu_rank(
            config,
            communicator=SingleCommunicator(),
            device=device,
            num_scratch_blocks=NUM_SCRATCH_BLOCKS,
        )
        runner: Any = rank.runner
        self.pool = runner._rank._model._pool.blocks
        assert len(self.pool) == rank.num_blocks + NUM_SCRATCH_BLOCKS
        assert rank.pool_bytes == self.pool.numel() * self.pool.element_size()
        self.engine = Engine(
            config=config,
            layout=rank.layout,
            num_blocks=rank.num_blocks,
            max_model_len=rank.max_model_len,
            runner=runner,
            clock=WallClock(),
            vocab_size=rank.vocab_size,
        )
        self.tokens: list[int] = []

    def submit(self, work: Work, sampling: SamplingParams, known: tuple[int, ...] = ()) -> None:
        source = PEER if work.reads_all_kv else None
        request = GenerateRequest(
            NAME, work, PROMPT, sampling, output_token_ids=known, kv_source=source
        )
        self.engine.submit(request)

    def step(self) -> StepOutput:
        output = self.engine.step()
        for delta in output.deltas:
            assert not delta.error
            self.tokens += delta.token_ids
        self.engine.check_integrity()
        return output

    def run(self) -> list[int]:
        while self.engine.has_work:
            self.step()
        return self.tokens


def test_taken_over_request_gives_the_tokens_of_an_unbroken_one(
    tmp_path: Path, compute_device: ComputeDevice
) -> None:
    folder = tiny_llama.write_checkpoint(
        tmp_path / "m",
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        max_position_embeddings=128,
    )
    config = EngineConfig(
        model_path=folder,
        dtype="float32",
        block_size=4,
        max_num_seqs=2,
        max_num_batched_tokens=12,
        kv_cache_bytes=1 << 17,
        num_threads=1,
    )
    sampling = SamplingParams(max_tokens=12, temperature=1.1, repetition_penalty=1.2)
    owner, reader = Worker(config, compute_device), Worker(config, compute_device)
    owner.submit(Work.GENERATE, sampling)
    expected = [*owner.run()]
    owner.tokens.clear()
    owner.submit(Work.GENERATE, sampling)
    while len(owner.tokens) < 3:
        owner.step()
    reader.submit(Work.TAKEOVER, sampling, tuple(owner.tokens))
    (reservation,) = reader.step().reservations
    owner.engine.start_handover(NAME, num_known_tokens=3)
    chunks = owner.step().chunks
    owner.engine.freeze(NAME)
    chunks += [c for _ in range(3) for c in owner.step().chunks]
    sources = [b for chunk in chunks for b in chunk.block_ids]
    with torch.inference_mode():
        for source, target in zip(sources, reservation.block_ids, strict=False):
            reader.pool[target] = owner.pool[source]
    if compute_device.is_gpu:
        torch.cuda.synchronize()
    owner.engine.finish_handover(NAME)
    reader.engine.activate(NAME, chunks[-1].first_token)
    assert chunks[-1].is_last
    assert owner.run() + reader.run() == expected
    for worker in (owner, reader):
        assert worker.engine.is_empty
        assert not worker.pool[-NUM_SCRATCH_BLOCKS:].any()
