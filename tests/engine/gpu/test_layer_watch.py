"""Marks of a step on a device are told in their order, by a thread that waits for them."""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_llama
from baton.core.block import BlockId
from baton.core.clock import WallClock
from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.engine.batch import Batch, LayerMarks, ScheduledSequence
from baton.engine.communicator import SingleCommunicator
from baton.engine.config import EngineConfig
from baton.engine.engine import ChunkDone, Engine, LayersDone
from baton.engine.gpu.build import BuiltRank, build_gpu_rank
from baton.engine.gpu.device import ComputeDevice
from baton.engine.gpu.layer_watch import LayerWatch
from baton.engine.sequence import Sequence

PROMPT = tuple((7 + i * i) % 48 for i in range(21))
WAIT_S = 10.0


class HeldEvents:
    """A device whose events pass when the test says so."""

    def __init__(self) -> None:
        self.events: list[HeldEvent] = []

    def record(self, *, sleeps: bool = False) -> HeldEvent:
        assert sleeps, "a thread that waits for most of a step must not turn a core"
        self.events.append(HeldEvent())
        return self.events[-1]


class HeldEvent:
    def __init__(self) -> None:
        self.passed = threading.Event()
        self.error: Exception | None = None

    def wait(self) -> None:
        assert self.passed.wait(WAIT_S)
        if self.error is not None:
            raise self.error


def test_marks_are_told_when_their_points_have_passed(caplog: pytest.LogCaptureFixture) -> None:
    device: Any = HeldEvents()
    watch = LayerWatch(device)
    told: queue.Queue[int] = queue.Queue()
    marks = LayerMarks((2, 3, 4), told.put)
    watch.pass_layers(None, 2)
    for num_layers in range(1, 5):
        watch.pass_layers(marks, num_layers)
    assert len(device.events) == 3
    device.events[1].error = RuntimeError("the device is gone")
    device.events[1].passed.set()
    device.events[2].passed.set()
    assert told.empty()
    with caplog.at_level(logging.WARNING):
        device.events[0].passed.set()
        assert [told.get(timeout=WAIT_S), told.get(timeout=WAIT_S)] == [2, 4]
    assert "the device is gone" in caplog.text


def built_rank(tmp_path: Path, compute_device: ComputeDevice) -> tuple[EngineConfig, BuiltRank]:
    folder = tiny_llama.write_checkpoint(
        tmp_path / "m",
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
    )
    config = EngineConfig(
        folder,
        dtype="float32",
        block_size=16,
        max_num_batched_tokens=16,
        max_num_seqs=2,
        max_graph_batch_size=0,
        kv_cache_bytes=1 << 18,
        layer_notice_min_tokens=1,
    )
    return config, build_gpu_rank(config, communicator=SingleCommunicator(), device=compute_device)


@pytest.mark.parametrize("max_graph_batch_size", [0, 2])
def test_a_last_chunk_is_told_by_layers_and_a_decode_step_is_not(
    tmp_path: Path, compute_device: ComputeDevice, max_graph_batch_size: int
) -> None:
    config, rank = built_rank(tmp_path, compute_device)
    engine = Engine(
        config=config,
        layout=rank.layout,
        num_blocks=rank.num_blocks,
        max_model_len=rank.max_model_len,
        runner=rank.runner,
        clock=WallClock(),
        vocab_size=rank.vocab_size,
    )
    told: queue.Queue[LayersDone] = queue.Queue()
    engine.tell_layers(told.put)
    sampling = SamplingParams(temperature=0.0, max_tokens=3)
    engine.submit(GenerateRequest(RequestId("g"), Work.GENERATE, PROMPT[:5], sampling))
    engine.submit(GenerateRequest(RequestId("p"), Work.PREFILL, PROMPT, sampling))
    chunks: list[ChunkDone] = []
    while engine.has_work:
        chunks += engine.step().chunks
    layers = [told.get(timeout=WAIT_S) for _ in range(2)]
    assert told.empty()
    assert [one.num_layers for one in layers] == [1, 2]
    assert {(one.fill_id, one.block_ids) for one in layers} == {
        (chunks[-1].fill_id, chunks[-1].block_ids)
    }
    engine.release_lease(RequestId("p"))
    engine.check_integrity()


class TwoRanks(SingleCommunicator):
    """Rank 0 of two, as the order of its calls goes; the other one adds nothing."""

    def __init__(self) -> None:
        self.num_sums = 0

    @property
    def size(self) -> int:
        return 2

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        self.num_sums += 1
        return x


def test_with_several_ranks_a_layer_is_marked_behind_its_sums(
    tmp_path: Path, compute_device: ComputeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only they say that the other ranks have written theirs."""
    _, rank = built_rank(tmp_path, compute_device)
    communicator = TwoRanks()
    monkeypatch.setattr(rank.runner._rank._model, "_communicator", communicator)
    marked: list[tuple[int, int]] = []

    def mark(_: LayerWatch, marks: LayerMarks | None, num_layers: int) -> None:
        marked.append((num_layers, communicator.num_sums))

    monkeypatch.setattr(LayerWatch, "pass_layers", mark)
    request = GenerateRequest(RequestId("p"), Work.PREFILL, PROMPT[:9], SamplingParams())
    sequence = Sequence(request)
    sequence.block_table = [BlockId(0)]
    marks = LayerMarks((1, 2), lambda num_layers: None)
    rank.runner.launch(Batch((ScheduledSequence(sequence, 9),), marks)).wait()
    # Two a layer, the first of which is behind the KV of all ranks.
    assert [num_layers for num_layers, _ in marked] == [1, 2]
    assert all(num_sums > 2 * (num_layers - 1) for num_layers, num_sums in marked)
