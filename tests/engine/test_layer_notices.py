"""What is told of a prompt's last chunk while it is computed, and when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import model_harness
import tiny_llama
from baton.core.errors import ConfigError
from baton.core.request import Work
from baton.engine.batch import Batch, LayerMarks, ScheduledSequence
from baton.engine.communicator import SingleCommunicator
from baton.engine.config import EngineConfig
from baton.engine.engine import LayersDone
from baton.engine.layer_notices import layer_groups

Make = Callable[..., Any]
PROMPT = [(3 + 11 * i) % 97 for i in range(22)]
SETTINGS = {"layer_notice_min_tokens": 1, "max_num_batched_tokens": 16}


@pytest.mark.parametrize(
    ("num_layers", "num_groups", "ends"),
    [
        (32, 4, (16, 24, 28, 32)),
        (30, 4, (15, 23, 27, 30)),
        (32, 1, (32,)),
        (32, 0, ()),
        (1, 4, (1,)),
        (2, 4, (1, 2)),
        (32, 16, (16, 24, 28, 30, 31, 32)),
    ],
)
def test_each_group_halves_what_is_left(num_layers, num_groups, ends):
    assert layer_groups(num_layers, num_groups) == ends


@pytest.mark.parametrize("changes", [{"layer_notice_groups": -1}, {"layer_notice_min_tokens": 0}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError, match="layer_notice_groups must be 0 to 16"):
        EngineConfig(model_path=Path("unused"), **changes)


class Told:
    """An engine whose runner passes all marks of a step when it is launched."""

    def __init__(self, h: Any) -> None:
        self.h = h
        self.layers: list[LayersDone] = []
        self.num_marked = 0
        h.engine.tell_layers(self.layers.append)
        launch = h.runner.launch

        def pass_all(batch: Batch) -> Any:
            step = launch(batch)
            if batch.layer_marks is not None:
                self.num_marked += 1
                batch.layer_marks.pass_layers(1)
                batch.layer_marks.pass_layers(5)
            return step

        h.runner.launch = pass_all


@pytest.mark.parametrize("num_tokens", [3, 16, 17, 22, 40])
def test_the_last_chunk_is_told_as_it_is_announced_later(
    make_harness: Make, assert_engine_empty: Make, num_tokens: int
) -> None:
    h = make_harness(**SETTINGS)
    told = Told(h)
    for name in ("a", "b"):
        h.submit(name, [*range(num_tokens - 1), 90 + len(name)], work=Work.PREFILL)
        h.run()
        (layers,) = told.layers
        chunk = h.records[name].chunks[-1]
        assert chunk.is_last and chunk.fill_id == layers.fill_id > 0
        assert (layers.first_block_index, layers.block_ids) == (
            chunk.first_block_index,
            chunk.block_ids,
        )
        assert layers.num_layers == 1
        assert all(not c.fill_id for c in h.records[name].chunks[:-1])
        h.engine.release_lease(name)
        told.layers.clear()
    assert_engine_empty(h.engine)


def test_no_two_computations_have_the_same_id(make_harness: Make) -> None:
    h = make_harness(**SETTINGS)
    told = Told(h)
    for _ in range(3):
        h.submit("a", PROMPT, work=Work.PREFILL)
        h.run()
        h.engine.release_lease("a")
        h.records.clear()
    assert len({layers.fill_id for layers in told.layers}) == len(told.layers) == 3


@pytest.mark.parametrize(
    "settings",
    [{"layer_notice_groups": 0}, {"layer_notice_min_tokens": 7}],
    ids=["switched off", "short chunk"],
)
def test_what_is_not_worth_it_is_not_told(make_harness: Make, settings: dict[str, int]) -> None:
    """The last chunk of 22 tokens has 6."""
    h = make_harness(**(SETTINGS | settings))
    told = Told(h)
    h.submit("a", PROMPT, work=Work.PREFILL)
    h.run()
    assert not told.num_marked and h.records["a"].chunks[-1].fill_id == 0
    h.engine.release_lease("a")


def test_work_that_stays_here_is_not_told(make_harness: Make) -> None:
    h = make_harness(**SETTINGS)
    told = Told(h)
    h.submit("a", PROMPT, max_tokens=3)
    h.run()
    assert not told.num_marked


@pytest.mark.parametrize("num_cached", [0, 9])
def test_layers_are_complete_when_they_are_passed(tmp_path: Path, num_cached: int) -> None:
    """On a CPU: the KV of a passed layer is what it is at the end, the next one's is not there."""
    folder = tiny_llama.write_checkpoint(tmp_path / "m", num_hidden_layers=3)
    h = model_harness.ModelHarness(folder, block_size=4, num_blocks=40)
    prompt = list(range(21))
    sequence = h.sequence(prompt, room=4)
    if num_cached:
        h.step((sequence, num_cached))
    seen: list[tuple[int, torch.Tensor]] = []
    # [blocks, heads, layers, 2, block_size, head_dim]
    memory = h.runner._pool.blocks
    blocks = list(sequence.block_table)

    def reached(num_layers: int) -> None:
        seen.append((num_layers, memory[blocks].clone()))

    batch = Batch(
        (ScheduledSequence(sequence, len(prompt) - num_cached),), LayerMarks((1, 2, 3), reached)
    )
    h.runner.launch(batch).wait()
    final = memory[blocks]
    assert [num_layers for num_layers, _ in seen] == [1, 2, 3]
    for num_layers, then in seen:
        assert torch.equal(then[:, :, :num_layers], final[:, :, :num_layers])
        for later in range(num_layers, 3):
            assert not torch.equal(then[:, :, later], final[:, :, later])


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


def test_with_several_ranks_a_layer_is_passed_behind_its_sums(tmp_path: Path) -> None:
    """Only they say that the other ranks have written theirs."""
    folder = tiny_llama.write_checkpoint(tmp_path / "m", num_hidden_layers=3)
    h = model_harness.ModelHarness(folder, block_size=4, num_blocks=40)
    communicator = h.runner._model._communicator = TwoRanks()
    sequence = h.sequence(list(range(21)), room=4)
    seen: list[tuple[int, int]] = []
    marks = LayerMarks((1, 2, 3), lambda n: seen.append((n, communicator.num_sums)))
    h.runner.launch(Batch((ScheduledSequence(sequence, 21),), marks)).wait()
    # Two a layer, the first of which is behind the KV of all ranks.
    assert [n for n, _ in seen] == [1, 2, 3]
    assert all(num_sums > 2 * (n - 1) for n, num_sums in seen)
