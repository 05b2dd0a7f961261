"""`baton bench`: a load on a running server, and what its clients get."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from baton.cli.bench_args import (
    add_load_arguments,
    add_server_arguments,
    add_workload_arguments,
)
from baton.cli.bench_load import load_test_of
from baton.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

    from baton.loadtest.load_test import LoadTest
    from baton.loadtest.result import LoadResult
    from baton.loadtest.runner import LoadRunner

EXIT_INTERRUPTED = 130
REFRESH_S = 0.2
WIDTH = 120
"""Where there is no terminal."""
EPILOG = """examples:
  baton bench                                           8 at a time, 100 requests of 128/64 tokens
  baton bench --rate 4 --lengths 512/64,4000/20 --ttft 0.5 --itl 0.05 --share 0.95
  baton bench --trace mooncake.jsonl.gz --speed 2 --requests 500 --html run.html
  baton bench --concurrency 16 --turns 2-6 --prefix 512x4 --duration 60
  baton bench --grpc 127.0.0.1:9000 --completions --token-ids 32000

Times are seconds. TTFT: to the first token; ITL: mean between the tokens of one request; gaps: all
single ones.
Status 0: at least --share of all requests were answered within the targets; 1: fewer; 130: stopped
by Ctrl-C, after the report of what there was. docs/loadtest.md explains loads and figures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_server_arguments(parser)
    add_workload_arguments(parser)
    add_load_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", type=Path, metavar="FILE", help="write one JSON object; - is standard output"
    )
    output.add_argument(
        "--details", action="store_true", help="with a row for every request in the JSON"
    )
    output.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    output.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    import uvloop

    test = load_test_of(args, environ)
    for path in (args.json, args.html):
        _check_writable(path)
    _allow_connections()
    # What is there now stays; looking through it again while tokens are timed takes milliseconds.
    gc.freeze()
    try:
        result = uvloop.run(_run(test, is_quiet=args.quiet))
    finally:
        gc.unfreeze()
    _report(result, args)
    if result.is_stopped:
        return EXIT_INTERRUPTED
    return 0 if result.is_kept else 1


async def _run(test: LoadTest, *, is_quiet: bool) -> LoadResult:
    from baton.loadtest.load_test import run_load_test

    # Made before the run: importing what draws it takes longer than many a first token.
    bar = None if is_quiet else _progress_bar()
    shown: list[asyncio.Task[None]] = []

    def on_start(runner: LoadRunner) -> None:
        _stop_on_interrupt(runner)
        if bar is not None:
            shown.append(asyncio.create_task(_show(bar, runner)))

    try:
        return await run_load_test(test, on_start)
    finally:
        # uvloop leaves its handler behind, and Ctrl-C would do nothing from here on.
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        for task in shown:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _stop_on_interrupt(runner: LoadRunner) -> None:
    """The first Ctrl-C ends the run with its report, a second one ends the program."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        runner.stop()

    loop.add_signal_handler(signal.SIGINT, stop)


def _progress_bar() -> Progress:
    """On standard error, where there is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("sending"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        # Its own thread would take the interpreter from the measured sockets.
        auto_refresh=False,
        transient=True,
    )


async def _show(bar: Progress, runner: LoadRunner) -> None:
    """Until cancelled."""
    from baton.loadtest.options import MAX_REQUESTS

    options = runner.options
    # As many as the time allows: the bar is of seconds then.
    is_timed = options.num_requests == MAX_REQUESTS
    total = int(options.duration_s) if is_timed else options.num_requests
    with bar:
        task = bar.add_task("", total=total, state="")
        while True:
            seen = runner.progress
            state = f"{seen.in_flight} at a time"
            if seen.num_failed:
                state += f", {seen.num_failed} failed"
            state += f", {seen.num_output_tokens / max(runner.now(), 1e-9):,.0f} tokens/s"
            done = int(runner.now()) if is_timed else seen.num_ended
            bar.update(task, completed=done, state=state, refresh=True)
            await asyncio.sleep(REFRESH_S)


def _report(result: LoadResult, args: argparse.Namespace) -> None:
    from baton.loadtest.html_report import html_report
    from baton.loadtest.json_report import json_report

    if args.json is not None:
        text = json.dumps(json_report(result, has_requests=args.details), indent=1) + "\n"
        if str(args.json) == "-":
            sys.stdout.write(text)
        else:
            args.json.write_text(text)
    if args.html is not None:
        args.html.write_text(html_report(result))
    if str(args.json) != "-":
        _print(result)


def _print(result: LoadResult) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from baton.loadtest.rows import HEADINGS, latency_rows, summary_rows

    console = Console(highlight=False, soft_wrap=True, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(f"{result.model} at {result.place}", style="bold")
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    for label, text in summary_rows(result):
        table.add_row(label, text)
    console.print(table)
    latencies = Table(*HEADINGS, box=box.SIMPLE_HEAD, pad_edge=False, title="milliseconds")
    for column in latencies.columns[1:]:
        column.justify = "right"
    for row in latency_rows(result.figures.latencies):
        latencies.add_row(*row)
    if latencies.row_count:
        console.print(latencies)
    for line in _notes(result):
        console.print(line)


def _notes(result: LoadResult) -> Iterator[str]:
    for error in result.figures.errors:
        yield f"{error.count} x {error.label}: {error.example}"
    for warning in result.generator.warnings:
        yield f"WARNING: {warning}"
    if result.is_stopped:
        yield "stopped early; these are the figures until then"


def _allow_connections() -> None:
    """As many files as the system lets us have: each request at a time is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_writable(path: Path | None) -> None:
    """Before the run, whose figures would be lost. Raises ConfigError."""
    if path is None or str(path) == "-":
        return
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: its folder must exist, and it must be a file")
