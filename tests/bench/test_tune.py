"""Tuning: which candidates are compiled and timed, and what is said of them."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest

from bench.gpu import tune
from bench.gpu.ceilings import Ceilings
from bench.gpu.gemm_inputs import Weights
from bench.gpu.tuned_shapes import OPS, GemmShape, tuned_shapes
from bench.gpu.warm import warm_up
from kernels.gemm_launch import Tile

CEILINGS = Ceilings(4e12, 4e12, 8e14, 16e14)
QKV = GemmShape(Weights.INT8, "m", "qkv", 8, 6144, 4096)
HEAD = GemmShape(Weights.INT8, "m", "head", 8, 128256, 4096)


def test_every_op_has_shapes_and_every_shape_a_table_tile() -> None:
    shapes = list(tuned_shapes())

    assert {shape.op for shape in shapes} == set(OPS)
    assert len({shape.name for shape in shapes}) == len(shapes)
    assert all(len(shape.tiles()) > 1 for shape in shapes)


def test_shapes_and_tiles_travel_to_other_processes() -> None:
    for task in tune.compile_tasks(list(tuned_shapes()), max_tiles=1):
        assert pickle.loads(pickle.dumps(task)) == task


def test_kernel_that_two_shapes_share_is_compiled_once() -> None:
    both = tune.compile_tasks([QKV, HEAD], 1000)
    alone = {tile for _, tile in tune.compile_tasks([QKV], 1000)}
    tiles = {*QKV.tiles(), *HEAD.tiles()}

    assert alone == set(QKV.tiles())
    assert len(both) == len(tiles)


def test_few_candidates_are_the_table_and_mostly_the_same_for_like_shapes() -> None:
    qkv, head = (tune.chosen_tiles(shape, 12) for shape in (QKV, HEAD))

    assert (qkv[0], head[0]) == (QKV.tiles()[0], HEAD.tiles()[0])
    assert len(qkv) == len(head) == 12
    assert len(set(qkv) & set(head)) >= 9


def test_ranking_is_by_time_and_gain_against_the_table() -> None:
    tiles = [Tile(8, 64, 64), Tile(8, 128, 64), Tile(8, 64, 128)]
    one = tune.Tuned("shape", "int8", 1e-5, tiles, {0: 2e-5, 2: 1.6e-5}, {1: "wrong: error 0.5"})

    assert one.ranking == [2, 0]
    assert one.gain == pytest.approx(1.25)
    table, best, *_ = one.rows()
    assert "table 20.00 us 50.0%" in table
    assert "16.00 us 62.5% (x1.250)" in best
    assert "block_k=128" in best
    assert one.as_json()["ranking"][0]["tile"]["block_k"] == 128


def test_shapes_that_were_not_compiled_or_come_late_are_listed() -> None:
    late, shapes = time.monotonic() - 1, [QKV, HEAD]

    def keep(one: tune.Tuned) -> None:
        raise AssertionError(one)

    skipped = tune.time_shapes(shapes, {}, CEILINGS, late, 8, keep)
    assert skipped == [f"{shape.name} (out of time)" for shape in shapes]
    skipped = tune.time_shapes(shapes, {}, CEILINGS, late + 60, 8, keep)
    assert skipped == [f"{shape.name} (not compiled in time)" for shape in shapes]


def test_unknown_op_is_refused() -> None:
    with pytest.raises(SystemExit, match="unknown gemm: give some of bf16"):
        tune.main(["--dry-run", "--ops", "gemm"])


@pytest.mark.parametrize(
    "only",
    [
        "bf16 llama-3.1-8b gate_up 28672 x 4096, 1 rows",
        "int8 llama-3.1-8b qkv 6144 x 4096, 8 rows",
        "int4 group 128 llama-3.1-8b o 4096 x 4096, 1 rows",
        "w8a8 llama-3.1-8b gate_up 28672 x 4096, 1024 rows",
        "decode 128 x 4096 h32/8 d128 block 64 fp8 KV",
        "prefill 1 x 8192 h32/8 d128 block 64 bf16",
    ],
)
def test_dry_run_finds_candidates_right(only: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = tune.main(["--dry-run", "--only", only, "--max-tiles", "3"])

    printed = capsys.readouterr().out
    assert status == 0, printed
    assert f"checked {only}: 3 tiles" in printed


def work(task: tuple[str, str]) -> None:
    """Of a worker process: leaves its mark, or fails in one of three ways."""
    kind, path = task
    if kind == "raise":
        raise ValueError("no such tile\nand more")
    if kind == "die":
        os._exit(3)
    if kind == "hang":
        time.sleep(60)
    Path(path).touch()


def test_tasks_that_fail_are_noted_and_the_rest_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests are imported by path; the worker processes import this one by name.
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import test_tune  # type: ignore[import-not-found]

    kinds = ["touch", "raise", "die", "hang", "touch"]
    tasks = [(kind, str(tmp_path / str(i))) for i, kind in enumerate(kinds)]

    warmed = warm_up(test_tune.work, tasks, num_jobs=2, limit_s=60, task_limit_s=15)

    assert warmed.ready == {0, 4}
    assert warmed.failed == {
        1: "ValueError: no such tile",
        2: "its process died",
        3: "no end within 15 s",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "4"]


def test_tasks_beyond_the_limit_are_not_begun(tmp_path: Path) -> None:
    warmed = warm_up(work, [("touch", str(tmp_path / "0"))], num_jobs=1, limit_s=0)

    assert warmed.ready == frozenset()
    assert warmed.failed == {}
