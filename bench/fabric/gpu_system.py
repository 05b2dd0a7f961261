"""What requests feel of the fabric between two GPUs, in two running `baton serve`.

apart      a prefill worker on one GPU, a decode worker on the other
together   two decode workers, one a GPU, that compute their prompts themselves; a running request
           can move from one to the other

Weights are random, in the shape of Llama-3.1-8B with a smaller vocabulary, so speeds are those of
the real model. Both systems have the same weights and each sees every prompt once, so their greedy
tokens are equal exactly if KV arrives as it was computed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.fabric.system import (
    TOKENS_BEFORE_MOVE,
    System,
    busiest,
    random_prompt,
    serving,
    transfer_row,
    wait_for_ended,
    wait_for_workers,
)
from bench.fabric.token_stream import TokenStream, stream_tokens
from bench.gpu.shapes import LLAMA_3_1_8B

VOCAB_SIZE = 49152
"""Of the tokenizer."""
KV_CACHE_BYTES = 16 << 30
CHUNK_TOKENS = 8192
PROMPTS = ((512, 7), (2048, 7), (CHUNK_TOKENS, 5), (2 * CHUNK_TOKENS, 5), (4 * CHUNK_TOKENS, 3))
LONG_PROMPTS = ((8 * CHUNK_TOKENS, 3),)
"""Tokens, rounds."""
OUTPUT_TOKENS = 24
MOVED_PROMPT_TOKENS = 8000
MOVED_OUTPUT_TOKENS = 400
START_TIMEOUT_S = 240.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SEED_STRIDE = 1009


def model_folder(folder: Path, tokenizer: Path) -> Path:
    """Of the shape, with the tokenizer files of the folder `tokenizer`."""
    LLAMA_3_1_8B.write_config(folder, vocab_size=VOCAB_SIZE)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder)
    return folder


def pool_options(pool: str) -> list[str]:
    """Settings of one pool: few sequences, so that little is compiled and captured."""
    settings = {
        "device": "cuda",
        "load_format": "dummy",
        "kv_cache_bytes": KV_CACHE_BYTES,
        "max_num_seqs": 8,
        "max_graph_batch_size": 8,
    }
    pairs = [f"{pool}.engine.{name}={value}" for name, value in settings.items()]
    return [word for pair in pairs for word in ("--set", pair)]


@dataclass(slots=True)
class Systems:
    """Both, ready."""

    apart: System
    together: System

    @property
    def start_s(self) -> dict[str, float]:
        return {"apart": self.apart.running.ready_s, "together": self.together.running.ready_s}


@contextmanager
def both_serving(tokenizer: Path, *options: str) -> Iterator[Systems]:
    """The two systems started at the same time; `options` go to both."""
    with tempfile.TemporaryDirectory() as folder:
        model = ("--model", str(model_folder(Path(folder) / "model", tokenizer)), *options)
        apart = [*model, *pool_options("prefill"), *pool_options("decode")]
        together = [*model, "--prefill", "0", "--decode", "2", *pool_options("decode")]
        with (
            _started(*apart) as first,
            serving(*together, start_timeout_s=START_TIMEOUT_S) as second,
        ):
            yield Systems(first(), second)


@contextmanager
def _started(*options: str) -> Iterator[Any]:
    """A system that starts while the caller goes on; a call waits for it and gives it."""
    found: list[System] = []
    failed: list[BaseException] = []
    is_up, is_over = threading.Event(), threading.Event()

    def run() -> None:
        try:
            with serving(*options, start_timeout_s=START_TIMEOUT_S) as system:
                found.append(system)
                is_up.set()
                is_over.wait()
        except BaseException as error:
            failed.append(error)
            is_up.set()

    def system() -> System:
        is_up.wait()
        if failed:
            raise failed[0]
        return found[0]

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield system
    finally:
        is_over.set()
        thread.join()


def hidden_row(systems: Systems, num_tokens: int, rounds: int, seed: int) -> dict[str, Any]:
    """Fresh prompts of one length, in both systems in turns, after one that is not counted."""
    gaps: dict[str, list[float]] = {"apart": [], "together": []}
    first: dict[str, list[float]] = {"apart": [], "together": []}
    later: dict[str, list[float]] = {"apart": [], "together": []}
    num_before = len(systems.apart.ended_requests()) + 1
    num_equal = 0
    for number in range(-1, rounds):
        prompt = random_prompt(num_tokens, seed * SEED_STRIDE + num_tokens + number)
        streams = {
            "apart": _stream(systems.apart, prompt),
            "together": _stream(systems.together, prompt),
        }
        if number < 0:
            continue
        num_equal += streams["apart"].token_ids == streams["together"].token_ids
        for name, stream in streams.items():
            steps = [b - a for a, b in itertools.pairwise(stream.times_s)]
            first[name].append(stream.first_token_s)
            gaps[name].append(steps[0])
            later[name].append(statistics.median(steps[1:]))
    ended = wait_for_ended(systems.apart, num_before + rounds)[num_before:]
    return {
        **transfer_row(num_tokens, ended, gaps),
        "first_token_s": {name: statistics.median(v) for name, v in first.items()},
        "step_s": {name: statistics.median(v) for name, v in later.items()},
        "equal_token_streams": f"{num_equal} of {rounds}",
    }


def row_text(row: dict[str, Any]) -> str:
    first = row["first_token_s"]
    return (
        f"{row['prompt_tokens']:8}{row['bytes'] / 1e6:9.1f}{first['apart'] * 1e3:9.1f}"
        f"{row['transfer_s'] * 1e3:11.2f}{row['exposed_s'] * 1e3:11.2f}{row['hidden']:9.1%}"
        f"{row['second_token_s'] * 1e3:12.2f}{row['colocated_second_token_s'] * 1e3:11.2f}"
        f"{row['added_s'] * 1e3:9.2f}   equal {row['equal_token_streams']}"
    )


HIDDEN_HEADER = (
    f"{'prompt':>8}{'KV MB':>9}{'1st ms':>9}{'moving ms':>11}{'exposed ms':>11}{'hidden':>9}"
    f"{'2nd tok ms':>12}{'colocated':>11}{'added':>9}"
)


def move_once(systems: Systems, seed: int) -> dict[str, Any]:
    """A stream of `together` whose worker is told to end in the middle; the same prompt's stream
    of `apart`, which stays, says which tokens are right."""
    system = systems.together
    wait_for_workers(system, 2)
    prompt = random_prompt(MOVED_PROMPT_TOKENS, seed * SEED_STRIDE + 7)
    before = len(system.ended_requests())
    pids = system.decode_pids()

    def end_busiest() -> None:
        os.kill(pids[busiest(pids)], signal.SIGTERM)

    def on_token(number: int) -> None:
        if number == TOKENS_BEFORE_MOVE:
            threading.Thread(target=end_busiest).start()

    moved = _stream(system, prompt, MOVED_OUTPUT_TOKENS, on_token)
    stayed = _stream(systems.apart, prompt, MOVED_OUTPUT_TOKENS)
    gaps = [b - a for a, b in itertools.pairwise(moved.times_s)]
    median = statistics.median(gaps)
    longest = max(gaps[TOKENS_BEFORE_MOVE:])
    ended = wait_for_ended(system, before + 1)[-1]
    return {
        "context_tokens": MOVED_PROMPT_TOKENS + TOKENS_BEFORE_MOVE,
        "median_gap_s": median,
        "longest_gap_s": longest,
        "pause_s": longest - median,
        "are_tokens_equal": moved.token_ids == stayed.token_ids,
        "moves": ended.get("migrations", []),
    }


def move_text(move: dict[str, Any]) -> str:
    states = ", ".join(
        f"{m['source']}->{m['target']} {m['state']} {m['failure']} "
        f"{m.get('transfer_bytes', 0) / 1e6:.0f} MB"
        for m in move["moves"]
    )
    return (
        f"{move['context_tokens']:8} tokens: gap {move['median_gap_s'] * 1e3:.1f} ms, longest "
        f"{move['longest_gap_s'] * 1e3:.1f}, pause {move['pause_s'] * 1e3:.1f} ms, tokens equal "
        f"{move['are_tokens_equal']}: {states}"
    )


def _stream(
    system: System, prompt: list[int], num_tokens: int = OUTPUT_TOKENS, on_token: Any = None
) -> TokenStream:
    return asyncio.run(
        stream_tokens(system.running.grpc_port, prompt, num_tokens, on_token=on_token)
    )
