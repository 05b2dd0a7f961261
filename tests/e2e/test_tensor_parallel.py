"""Pools with different tensor-parallel sizes under one router; ranks are killed under streams."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import tokenizers

from baton.core.clock import ManualClock
from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.engine.config import EngineConfig
from baton.engine.factory import build_engine
from running_system import RunningSystem
from tiny_llama import write_checkpoint, write_pair_tokenizer

PROMPTS = [[(7 * i + 31 * k) % 256 for i in range(90)] for k in range(3)]
MAX_TOKENS = 60
TIMEOUT_S = 60.0
RANK_TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose 256 tokens are pairs of letters, so that a text shows every token."""
    folder = write_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", vocab_size=256, num_key_value_heads=4
    )
    write_pair_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def start(
    tmp_path_factory: pytest.TempPathFactory, folder: Path
) -> Iterator[Callable[..., RunningSystem]]:
    """(prefill ranks, decode ranks) -> a running system; every prompt goes through both pools."""
    systems: list[RunningSystem] = []

    def start(prefill: int, decode: int, *, pool_per_rank: bool = False) -> RunningSystem:
        settings = [
            f"prefill.engine.tp_size={prefill}",
            f"decode.engine.tp_size={decode}",
            "router.policy.local_prefill_max_tokens=0",
            *(
                f"{pool}.engine.{setting}"
                for pool in ("prefill", "decode")
                for setting in (
                    "num_threads=1",
                    f"rank_timeout_s={RANK_TIMEOUT_S}",
                    "kv_cache_bytes=1048576",
                    f"pool_per_rank={str(pool_per_rank).lower()}",
                )
            ),
        ]
        arguments = ["--no-ray", "--model", str(folder), "--dtype", "float32"]
        for setting in settings:
            arguments += ["--set", setting]
        systems.append(RunningSystem(arguments, tmp_path_factory.mktemp("run")))
        systems[-1].start()
        return systems[-1]

    yield start
    for system in systems:
        system.kill()


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[str]:
    """What an engine of one rank answers."""
    config = EngineConfig(model_path=folder, dtype="float32", kv_cache_bytes=1 << 20, num_threads=1)
    engine = build_engine(config, clock=ManualClock()).engine
    decoder = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    texts = []
    for i, prompt in enumerate(PROMPTS):
        request_id = RequestId(f"r{i}")
        engine.submit(GenerateRequest(request_id, Work.GENERATE, tuple(prompt), sampling))
        token_ids: list[int] = []
        while engine.has_work:
            token_ids += [t for delta in engine.step().deltas for t in delta.token_ids]
        texts.append(decoder.decode(token_ids))
    assert len(set(texts)) == len(PROMPTS)
    return texts


def complete(
    system: RunningSystem,
    prompt: list[int],
    at_chunk: int = 0,
    action: threading.Thread | None = None,
) -> str:
    """The greedy text; `action` starts once `at_chunk` pieces of it have come."""
    body = {
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    pieces: list[str] = []
    url = f"{system.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=TIMEOUT_S, trust_env=False) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            assert '"error"' not in line, line
            pieces.append(json.loads(line[6:])["choices"][0]["text"])
            if action is not None and len(pieces) == at_chunk:
                action.start()
    return "".join(pieces)


def wait_for_another(system: RunningSystem, role: str, old_epoch: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        with contextlib.suppress(grpc.RpcError, ValueError):
            if system.worker(role).epoch != old_epoch:
                return
        assert time.monotonic() < deadline, system.logs()
        time.sleep(0.1)


def test_prefill_on_one_rank_decode_on_two(
    start: Callable[..., RunningSystem], expected: list[str]
) -> None:
    system = start(1, 2)
    assert_texts(system, expected)
    lose_rank(system, "decode", signal.SIGKILL, expected)
    lose_rank(system, "decode", signal.SIGSTOP, expected)
    killed, stopped = group_errors(system, "decode")
    assert "was killed by SIGKILL" in killed
    assert "rank 1 is stopped by a signal" in stopped
    assert_ends(system)


@pytest.mark.slow
def test_prefill_on_two_ranks_decode_on_one(
    start: Callable[..., RunningSystem], expected: list[str]
) -> None:
    system = start(2, 1)
    assert_texts(system, expected)
    lose_rank(system, "prefill", signal.SIGKILL, expected)
    (killed,) = group_errors(system, "prefill")
    assert "was killed by SIGKILL" in killed
    assert_ends(system)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (2, 1),
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(2, 2, marks=pytest.mark.slow),
    ],
)
def test_ranks_with_a_pool_each(
    start: Callable[..., RunningSystem], expected: list[str], prefill: int, decode: int
) -> None:
    system = start(prefill, decode, pool_per_rank=True)
    assert_texts(system, expected)
    assert "rank 1: KV transports: " in system.logs()
    if prefill == decode:
        lose_rank(system, "decode", signal.SIGKILL, expected)
    assert_ends(system)


def assert_texts(system: RunningSystem, expected: list[str]) -> None:
    assert [complete(system, prompt) for prompt in PROMPTS] == expected
    system.assert_nothing_leaked()
    assert '"tp_size":2' in system.logs()


def lose_rank(
    system: RunningSystem, role: str, number: signal.Signals, expected: list[str]
) -> None:
    """The group ends with one error, the client gets its text, another worker takes over."""
    worker = system.worker(role)
    process = psutil.Process(worker.pid)
    (rank,) = process.children()
    # A prefill worker has finished its part when the first piece comes.
    at_chunk = 20 if role == "decode" else 1
    lose = threading.Thread(target=os.kill, args=(rank.pid, number))
    assert complete(system, PROMPTS[0], at_chunk, lose) == expected[0]
    # A prompt after it, to the lost worker or past it.
    assert complete(system, PROMPTS[1]) == expected[1]
    gone, alive = psutil.wait_procs([rank, process], 20)
    assert (len(gone), alive) == (2, [])
    wait_for_another(system, role, worker.epoch)
    assert complete(system, PROMPTS[2]) == expected[2]
    system.assert_nothing_leaked()


def assert_ends(system: RunningSystem) -> None:
    system.interrupt(20)
    assert system.leftovers() == []


def group_errors(system: RunningSystem, role: str) -> list[str]:
    """What the log of the pool's only worker says of lost groups."""
    log = (system.run_dir / "logs" / f"{role}-0.log").read_text()
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    name = "baton.engine.tensor_parallel.group"
    return [e["message"] for e in entries if (e["logger"], e["level"]) == (name, "error")]


def test_impossible_size_is_refused_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    arguments = ["--no-ray", "--model", str(folder), "--set", "decode.engine.tp_size=3"]
    system = RunningSystem(arguments, tmp_path)
    system.launch()
    assert system.process is not None
    assert system.process.wait(TIMEOUT_S) == 2
    assert "decode pool: tp_size 3 does not divide num_attention_heads 4; take 1, 2 or 4" in (
        system.output
    )
    assert list(tmp_path.glob("logs/*")) == []
