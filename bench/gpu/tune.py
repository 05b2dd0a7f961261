"""Times every candidate tile of the kernels at the shapes that matter, beside the table's own.

    python -m bench.gpu.tune [--ops bf16,int8,...] [--only TEXT] [--budget-s 540] [--jobs 14]
                             [--max-tiles 24]
    python -m bench.gpu.tune --dry-run [--max-tiles 2]   checks candidates at tiny sizes, no GPU

First worker processes launch every candidate once, which compiles it; then this process times
those that ran, in turns: all of them briefly, the fastest and the table's again with care. A
result that is wrong takes no part. The tables are edited by hand, from the JSON that is written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from bench import machine
from bench.gpu.interpreted import interpreted

if TYPE_CHECKING:
    from bench.gpu.cases import Scale
    from bench.gpu.ceilings import Ceilings
    from bench.gpu.tuned_shapes import TunedShape

BUDGET_S = 540.0
COMPILE_SHARE = 0.5
"""Of the budget, at most, before the first shape is timed."""
NUM_FINALISTS = 6
MAX_TILES = 24
"""Candidates of a shape, so that many shapes have their turn; a few shapes can afford all."""
WORTH_CHANGING = 1.03
TABLE = 0
"""Index of the table's own tile among a shape's candidates."""


@dataclass(slots=True)
class Tuned:
    """What a shape's candidates reached."""

    shape: str
    op: str
    limit_s: float
    tiles: Sequence[Any]
    seconds: dict[int, float] = field(default_factory=dict)
    """Index of the tile -> median."""
    notes: dict[int, str] = field(default_factory=dict)

    @property
    def ranking(self) -> list[int]:
        return sorted(self.seconds, key=self.seconds.__getitem__)

    @property
    def gain(self) -> float:
        """How many times as long as the best the table's tile takes; 1 where it has no time."""
        if TABLE not in self.seconds:
            return 1.0
        return self.seconds[TABLE] / self.seconds[self.ranking[0]]

    def rows(self) -> list[str]:
        if not self.seconds:
            return [f"{self.shape}: no candidate ran: {self.notes}"]
        own = self.seconds.get(TABLE)
        table = "no time" if own is None else f"{own * 1e6:.2f} us {self.limit_s / own:.1%}"
        lines = [f"{self.shape}: table {table}  {describe_tile(self.tiles[TABLE])}"]
        for index in self.ranking[:3]:
            seconds = self.seconds[index]
            ratio = "" if own is None else f" (x{own / seconds:.3f})"
            share = f"{self.limit_s / seconds:.1%}"
            tile = describe_tile(self.tiles[index])
            lines.append(f"    {seconds * 1e6:9.2f} us {share}{ratio}  {tile}")
        if self.notes:
            lines.append(f"    {len(self.notes)} of {len(self.tiles)} candidates left out")
        return lines

    def as_json(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "op": self.op,
            "limit_us": round(self.limit_s * 1e6, 3),
            "table": asdict(self.tiles[TABLE]),
            "gain": round(self.gain, 4),
            "ranking": [
                {"us": round(self.seconds[i] * 1e6, 3), "tile": asdict(self.tiles[i])}
                for i in self.ranking
            ],
            "left_out": {describe_tile(self.tiles[i]): note for i, note in self.notes.items()},
        }


def describe_tile(tile: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(tile).items())


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.dry_run:
        with interpreted():
            return _dry_run(options)
    return _measure(options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.tune",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--ops", type=lambda text: tuple(text.split(",")), default=())
    parser.add_argument("--only", default="", help="shapes whose names contain this text")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for everything")
    parser.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0)) - 2))
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder of the JSON")
    parser.add_argument("--commit", help="names the tree where there is no git to ask")
    parser.add_argument("--max-tiles", type=int, default=MAX_TILES, help="candidates of a shape")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, no GPU, no times")
    return parser.parse_args(arguments)


def chosen_shapes(options: argparse.Namespace) -> list[TunedShape]:
    """Raises SystemExit for an unknown op."""
    from bench.gpu.tuned_shapes import OPS, tuned_shapes

    unknown = sorted(set(options.ops) - set(OPS))
    if unknown:
        raise SystemExit(f"unknown {', '.join(unknown)}: give some of {', '.join(OPS)}")
    return [
        shape
        for shape in tuned_shapes()
        if (not options.ops or shape.op in options.ops) and options.only in shape.name
    ]


def _dry_run(options: argparse.Namespace) -> int:
    """Runs candidates under the interpreter; exit status 1 if one is wrong."""
    from bench.gpu.cases import ERROR_LIMITS, TINY_SCALE, worst
    from bench.gpu.tuned_shapes import BF16

    num_bad = 0
    for full_shape in chosen_shapes(options):
        shape = full_shape.at(TINY_SCALE)
        tiles = chosen_tiles(shape, options.max_tiles)
        prepared = shape.prepare(TINY_SCALE, tiles)
        error = worst(prepared.error(tile) for tile in tiles)
        is_bad = not error <= ERROR_LIMITS[BF16]
        num_bad += is_bad
        verdict = "WRONG" if is_bad else "checked"
        print(f"{verdict} {full_shape.name}: {len(tiles)} tiles, error {error:.2g}")
    return 1 if num_bad else 0


def _measure(options: argparse.Namespace) -> int:
    import torch

    from bench.gpu.ceilings import measure_ceilings
    from bench.gpu.report import ceilings_line

    if not torch.cuda.is_available():
        print("no CUDA device: only --dry-run works here", file=sys.stderr)
        return 2
    end_s = time.monotonic() + options.budget_s
    torch.manual_seed(0)
    about = machine.describe() | machine.describe_gpu()
    about["commit"] = options.commit or about["commit"]
    ceilings = measure_ceilings()
    torch.cuda.empty_cache()
    print(f"{about['gpu']}: {ceilings_line(ceilings)}", flush=True)
    shapes = chosen_shapes(options)
    ready = _compile(shapes, options)
    tuned: list[Tuned] = []

    def store(skipped: Sequence[str] = ()) -> Path:
        content = {
            "machine": about,
            "ceilings": asdict(ceilings),
            "shapes": [one.as_json() for one in tuned],
            "skipped": list(skipped),
        }
        return machine.store("tune", content, options.out)

    def keep(one: Tuned) -> None:
        tuned.append(one)
        print("\n".join(one.rows()), flush=True)
        # A run that is stopped leaves what it has.
        store()

    skipped = time_shapes(shapes, ready, ceilings, end_s, options.max_tiles, keep)
    for line in skipped:
        print(f"skipped: {line}")
    print(f"\nworth changing (x{WORTH_CHANGING} and more):")
    for one in sorted(tuned, key=lambda one: -one.gain):
        if one.gain >= WORTH_CHANGING:
            best = describe_tile(one.tiles[one.ranking[0]])
            print(f"x{one.gain:.3f}  {one.shape}  {best}")
    print(store(skipped))
    return 0


def chosen_tiles(shape: TunedShape, max_tiles: int) -> list[Any]:
    """The table's tile and `max_tiles` - 1 of the other candidates.

    They are drawn by what they are and not by where they stand, so that shapes whose candidates
    are alike draw alike and share compiled kernels.
    """
    table, *others = shape.tiles()
    if len(others) >= max_tiles:
        others = sorted(others, key=lambda tile: crc32(repr(tile).encode()))[: max_tiles - 1]
    return [table, *others]


def compile_tasks(shapes: Sequence[TunedShape], max_tiles: int) -> list[tuple[TunedShape, Any]]:
    """One of every compiled kernel, in the order of the shapes."""
    tasks: dict[object, tuple[TunedShape, Any]] = {}
    for shape in shapes:
        for tile in chosen_tiles(shape, max_tiles):
            tasks.setdefault((shape.op, shape.compile_key(tile)), (shape, tile))
    return list(tasks.values())


Outcomes = Mapping[object, str | None]
"""(op, compile key) -> None where the kernel ran, or why it did not."""


def _compile(shapes: Sequence[TunedShape], options: argparse.Namespace) -> Outcomes:
    from bench.gpu.warm import warm_up

    tasks = compile_tasks(shapes, options.max_tiles)
    start = time.monotonic()
    limit_s = options.budget_s * COMPILE_SHARE
    warmed = warm_up(launch_once, tasks, num_jobs=options.jobs, limit_s=limit_s)
    print(
        f"{len(warmed.ready)} of {len(tasks)} kernels compiled in {time.monotonic() - start:.0f} s,"
        f" {len(warmed.failed)} failed",
        flush=True,
    )
    keys = [(shape.op, shape.compile_key(tile)) for shape, tile in tasks]
    outcomes: dict[object, str | None] = {keys[index]: None for index in warmed.ready}
    return outcomes | {keys[index]: why for index, why in warmed.failed.items()}


def launch_once(task: tuple[TunedShape, Any]) -> None:
    """In a worker process."""
    import torch

    from bench.gpu.cases import Scale

    shape, tile = task
    scale = Scale(torch.device("cuda"), max_input_sets=1)
    for call in shape.prepare(scale, [tile]).calls(tile):
        call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def time_shapes(
    shapes: Sequence[TunedShape],
    outcomes: Outcomes,
    ceilings: Ceilings,
    end_s: float,
    max_tiles: int,
    keep: Callable[[Tuned], None],
) -> list[str]:
    """Times shapes until `end_s`; returns those left out, and why."""
    import torch

    from bench.gpu.cases import GPU_SCALE

    skipped = []
    longest_s = 0.0
    for shape in shapes:
        tiles = chosen_tiles(shape, max_tiles)
        states = [outcomes.get((shape.op, shape.compile_key(tile)), "") for tile in tiles]
        start = time.monotonic()
        if start + longest_s > end_s:
            skipped.append(f"{shape.name} (out of time)")
            continue
        if "" in states and states.count(None) < 2:
            skipped.append(f"{shape.name} (not compiled in time)")
            continue
        one = Tuned(shape.name, shape.op, _limit_s(shape, ceilings), tiles)
        one.notes = {
            i: state or "not compiled in time"
            for i, state in enumerate(states)
            if state is not None
        }
        try:
            _time(shape, one, GPU_SCALE)
        except Exception as error:
            skipped.append(f"{shape.name} ({type(error).__name__}: {error})")
        else:
            keep(one)
        torch.cuda.empty_cache()
        longest_s = max(longest_s, time.monotonic() - start)
    return skipped


def _time(shape: TunedShape, one: Tuned, scale: Scale) -> None:
    """All that ran ahead briefly, then the finalists with care."""
    from bench.gpu.cases import ERROR_LIMITS
    from bench.gpu.timing import time_in_turns
    from bench.gpu.tuned_shapes import BF16

    usable = [i for i in range(len(one.tiles)) if i not in one.notes]
    prepared = shape.prepare(scale, [one.tiles[i] for i in usable])
    calls = {str(i): prepared.calls(one.tiles[i]) for i in usable}
    brief = time_in_turns(calls, rounds=2, round_s=0.002)
    ranking = sorted(usable, key=lambda i: brief[str(i)].median_s)
    finalists: list[int] = []
    for i in ranking:
        if i == TABLE or len(finalists) < NUM_FINALISTS:
            error = prepared.error(one.tiles[i])
            if error <= ERROR_LIMITS[BF16]:
                finalists.append(i)
            else:
                one.notes[i] = f"wrong: error {error:.2g}"
    careful = time_in_turns({str(i): calls[str(i)] for i in finalists}, rounds=5, round_s=0.01)
    one.seconds = {i: careful[str(i)].median_s for i in finalists}


def _limit_s(shape: TunedShape, ceilings: Ceilings) -> float:
    from bench.gpu.cases import Bound

    if shape.bound is Bound.COPY:
        return shape.num_bytes / ceilings.copy_bytes_per_s
    if shape.bound is Bound.READ:
        return shape.num_bytes / ceilings.read_bytes_per_s
    is_fp8 = shape.bound is Bound.FP8_MATMUL
    return shape.flops / (ceilings.fp8_flops_per_s if is_fp8 else ceilings.bf16_flops_per_s)


if __name__ == "__main__":
    sys.exit(main())
