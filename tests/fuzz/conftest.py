"""The live system with a tiny model, and what must hold of it when the fuzzing has ended."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from fuzzing import Campaign
from running_system import RunningSystem
from tiny_llama import write_byte_tokenizer, write_checkpoint

MODEL = "tiny"
VOCAB_SIZE = 320
MAX_GROWTH_BYTES = 160 << 20
"""Of one process: caches of structures and templates fill, and allocators keep what they had."""
MAX_MORE_FDS = 24
SETTLE_S = 60.0
CANARY = {"model": MODEL, "prompt": "abc", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@dataclass
class Fuzzed:
    """The system, and what it held before."""

    system: RunningSystem
    text: str = ""
    """What the canary is answered with."""
    before: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Resident bytes and file descriptors by process."""

    def ask(self) -> str:
        answer = httpx.post(
            f"{self.system.url}/v1/completions", json=CANARY, timeout=60, trust_env=False
        )
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    def note(self) -> None:
        """What is held now is what may be held."""
        self.text = self.ask()
        self.before = self._held()

    async def canary(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            answer = await client.post(f"{self.system.url}/v1/completions", json=CANARY)
        # Overload is an answer too.
        if answer.status_code != 429:
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == self.text

    def assert_unharmed(self) -> None:
        """The same processes, answering the same, holding nothing more."""
        deadline = time.monotonic() + SETTLE_S
        while problem := self._problem():
            assert time.monotonic() < deadline, problem
            time.sleep(0.5)
        assert self.ask() == self.text
        self.system.assert_nothing_leaked()
        assert not self._tracebacks(), self._tracebacks()[0]

    def _tracebacks(self) -> list[str]:
        """Of our own: gRPC logs some about connections that no client of it would make."""
        files = self.system.run_dir.glob("logs/*")
        lines = [line for file in files for line in file.read_text(errors="replace").split("\n")]
        return [
            line
            for line in lines
            if '"exception":"Traceback' in line and '"logger":"grpc._cython' not in line
        ]

    def _problem(self) -> str:
        load = httpx.get(f"{self.system.url}/load", timeout=10, trust_env=False).json()
        if load["server_load"]:
            return f"{load['server_load']} requests are still being answered"
        held = self._held()
        if held.keys() != self.before.keys():
            return f"processes were {sorted(self.before)} and are {sorted(held)}"
        for pid, (num_bytes, num_fds) in held.items():
            bytes_before, fds_before = self.before[pid]
            name = " ".join(psutil.Process(pid).cmdline()[-3:])
            if num_bytes > bytes_before + MAX_GROWTH_BYTES:
                return f"{name} grew from {bytes_before >> 20} to {num_bytes >> 20} MiB"
            if num_fds > fds_before + MAX_MORE_FDS:
                return f"{name} had {fds_before} file descriptors and has {num_fds}"
        return ""

    def growth_mib(self) -> dict[int, int]:
        held = self._held()
        return {pid: (held[pid][0] - was) >> 20 for pid, (was, _) in self.before.items()}

    def _held(self) -> dict[int, tuple[int, int]]:
        held = {}
        for pid in self.system.members:
            process = psutil.Process(pid)
            held[pid] = (process.memory_info().rss, process.num_fds())
        return held


@pytest.fixture(scope="session")
def campaign() -> Campaign:
    return Campaign.of_environment()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / MODEL
    write_checkpoint(folder, vocab_size=VOCAB_SIZE)
    write_byte_tokenizer(folder)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture(scope="session")
def started(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    system = RunningSystem(
        [
            *("--no-ray", "--model", str(model), "--dtype", "float32"),
            *("--set", "router.policy.local_prefill_max_tokens=16"),
            *("--set", "router.edge.max_body_bytes=262144"),
            *("--set", "router.edge.head_timeout_s=5", "--set", "router.edge.body_timeout_s=5"),
        ],
        tmp_path_factory.mktemp("run"),
    )
    system.start()
    yield system
    system.kill()


@pytest.fixture
def fuzzed(started: RunningSystem, campaign: Campaign) -> Iterator[Fuzzed]:
    fuzzed = Fuzzed(started)
    fuzzed.note()
    yield fuzzed
    fuzzed.assert_unharmed()
    print(f"grown by {fuzzed.growth_mib()} MiB")
