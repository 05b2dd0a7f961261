"""A live system with one worker a pool: how it starts, and what lone requests cost beside steps.

    start ─► workers announce themselves ─► router is healthy ─► rounds of requests ─► stop

    a round   a prompt of each length, alone                     one token each
              a stream alone, some streams together              after a hand-off
              prompts one after the other while streams run      both pools at work

Does not know: what is made of it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from baton.cli.profile_client import Streamed, completion_body, stream_completion
from baton.core.clock import MonotonicClock
from baton.core.config import merge
from baton.core.errors import Unavailable
from services.launch.config import SystemConfig
from services.launch.processes import start_system
from services.launch.readiness import wait_until_healthy
from services.launch.run_directory import RunDirectory
from services.planner.profiling.overheads import LiveSeen, PromptSeen, StreamsSeen

if TYPE_CHECKING:
    from services.launch.supervisor import Supervisor

STREAM_TOKENS = 24
SKIPPED_TOKENS = 2
"""Of a stream: the first comes from another worker, the second after the hand-off."""
BATCH_SIZES = (1, 4)
POLL_S = 0.02
STOP_GRACE_S = 8.0
_LINK_SERIES = re.compile(r"^baton_kv_link_bytes_per_second\{[^}]*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the live system."""

    prompt_lengths: tuple[int, ...]
    stream_prompt_tokens: int
    vocab_size: int
    num_rounds: int
    ready_timeout_s: float
    seed: int


def measure_system(
    system: SystemConfig, question: Question, *, on_round: Callable[[int], None]
) -> LiveSeen:
    """Start `system`, ask, stop it. Raises Unavailable when it will not come up or fails."""
    directory, system = RunDirectory.create(), _on_free_ports(system)
    try:
        with running(system, directory, question.ready_timeout_s) as (address, start_s):
            prober = _Prober(address, system.served_model_name, question)
            asyncio.run(prober.run(on_round))
            rate = _link_rate(address)
    except Unavailable as error:
        raise Unavailable(f"{error}; the logs are in {directory.path / 'logs'}") from error
    directory.remove()
    return LiveSeen(prober.prompts, prober.streams, start_s, rate)


@contextmanager
def running(
    system: SystemConfig, directory: RunDirectory, timeout_s: float
) -> Iterator[tuple[str, dict[str, float]]]:
    """The router's address, and seconds from start to announcement of each pool's worker."""
    started_s = time.monotonic()
    supervisor = start_system(system, directory)
    try:
        start_s = _until_announced(system, directory.registry, supervisor, started_s, timeout_s)
        address = f"{system.host}:{system.http_port}"
        wait_until_healthy(
            f"http://{address}", timeout_s=timeout_s, still_running=_failure(supervisor)
        )
        yield address, start_s
    finally:
        supervisor.stop(grace_s=STOP_GRACE_S)


def _failure(supervisor: Supervisor) -> Callable[[], str | None]:
    def failure() -> str | None:
        supervisor.poll()
        return supervisor.hopeless()

    return failure


def _until_announced(
    system: SystemConfig,
    registry: Path,
    supervisor: Supervisor,
    started_s: float,
    timeout_s: float,
) -> dict[str, float]:
    from baton.registry.directory import DirectoryRegistry

    members = DirectoryRegistry(registry, clock=MonotonicClock())
    failure = _failure(supervisor)
    start_s: dict[str, float] = {}
    while len(start_s) < len(system.roles):
        for worker in asyncio.run(members.list()).values():
            start_s.setdefault(worker.role.value, time.monotonic() - started_s)
        reason = failure()
        if reason is None and time.monotonic() - started_s > timeout_s:
            reason = f"workers did not announce themselves within {timeout_s:.0f} s"
        if reason is not None:
            raise Unavailable(reason)
        time.sleep(POLL_S)
    return start_s


class _Prober:
    """Rounds of requests of fresh random tokens."""

    def __init__(self, address: str, model: str, question: Question) -> None:
        self._address, self._model, self._question = address, model, question
        self._rng = random.Random(question.seed)
        self.prompts: list[PromptSeen] = []
        self.streams: list[StreamsSeen] = []

    async def run(self, on_round: Callable[[int], None]) -> None:
        for number in range(self._question.num_rounds + 1):
            await self._round()
            if number == 0:
                # Warm-up: links, caches, the tensor library's own choices.
                self.prompts.clear()
                self.streams.clear()
            on_round(number + 1)

    async def _round(self) -> None:
        for length in self._question.prompt_lengths:
            self.prompts.append(PromptSeen(length, await self._prompt_s(length), False))
        for size in BATCH_SIZES:
            await self._together(size)
        await self._beside()

    async def _prompt_s(self, length: int) -> float:
        return (await self._ask(length, 1)).ttft_s

    async def _together(self, size: int) -> None:
        """`size` streams; what counts is the time in which all of them decode."""
        length = self._question.stream_prompt_tokens
        # The later ones' prompts are computed while the first ones decode.
        num_tokens = STREAM_TOKENS if size == 1 else 3 * STREAM_TOKENS
        asked = await asyncio.gather(*(self._ask(length, num_tokens) for _ in range(size)))
        from_s = max(s.arrivals_s[min(SKIPPED_TOKENS, len(s.arrivals_s) - 1)] for s in asked)
        seen = _between(asked[0], from_s, min(s.last_s for s in asked))
        if seen is None:
            return
        itl_s, num_before = seen
        context = length + num_before
        handoff_s = asked[0].arrivals_s[1] - asked[0].arrivals_s[0] if size == 1 else None
        self.streams.append(StreamsSeen(size, length, handoff_s, itl_s, context, False))

    async def _beside(self) -> None:
        """Prompts one after the other while a stream decodes: each slows the other one down."""
        length = self._question.stream_prompt_tokens
        prompt_length = self._question.prompt_lengths[-1]
        stream = asyncio.create_task(self._ask(length, 8 * STREAM_TOKENS))
        prompts: list[tuple[float, float, float]] = []
        await asyncio.sleep(0)
        while not stream.done():
            asked = await self._ask(prompt_length, 1)
            prompts.append((asked.sent_s, asked.last_s, asked.ttft_s))
        streamed = await stream
        from_s = streamed.arrivals_s[min(SKIPPED_TOKENS, len(streamed.arrivals_s) - 1)]
        inside = [p for p in prompts if p[0] >= from_s and p[1] <= streamed.last_s]
        self.prompts += [PromptSeen(prompt_length, ttft_s, True) for _, _, ttft_s in inside]
        if not inside:
            return
        seen = _between(streamed, inside[0][0], inside[-1][1])
        if seen is not None:
            itl_s, num_before = seen
            self.streams.append(StreamsSeen(1, length, None, itl_s, length + num_before, True))

    async def _ask(self, num_prompt_tokens: int, max_tokens: int) -> Streamed:
        vocab = self._question.vocab_size
        prompt = [self._rng.randrange(vocab) for _ in range(num_prompt_tokens)]
        return await stream_completion(
            self._address, completion_body(self._model, prompt, max_tokens)
        )


def _between(streamed: Streamed, from_s: float, to_s: float) -> tuple[float, float] | None:
    """Mean gap of the tokens in that time, and how many output tokens there were on average."""
    inside = [(i, at_s) for i, at_s in enumerate(streamed.arrivals_s) if from_s <= at_s <= to_s]
    if len(inside) < 3:
        return None
    (first, first_s), (last, last_s) = inside[0], inside[-1]
    return (last_s - first_s) / (last - first), (first + last) / 2


def _link_rate(address: str) -> float | None:
    """The median of what the workers have timed."""
    try:
        text = httpx.get(f"http://{address}/metrics", timeout=10.0, trust_env=False).text
    except httpx.HTTPError as error:
        raise Unavailable(f"no metrics from {address}: {error}") from error
    rates = sorted(float(value) for value in _LINK_SERIES.findall(text))
    rates = [rate for rate in rates if rate > 0]
    return rates[len(rates) // 2] if rates else None


def _on_free_ports(system: SystemConfig) -> SystemConfig:
    """Every prompt of it is handed over: what a local prefill costs, the steps say."""
    http_port, grpc_port = free_ports(2)
    return dataclasses.replace(
        system,
        http_port=http_port,
        grpc_port=grpc_port,
        num_routers=1,
        num_prefill=1,
        num_decode=1,
        router=merge(system.router, {"policy": {"local_prefill_max_tokens": 0}}),
    )


def free_ports(num: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(num)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()
