"""Requests of a seeded random generator against a cluster, and what must be true of the answers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster import Answer, Cluster


class Expected(Protocol):
    """What an engine that nothing happens to answers."""

    def prompt(self, index: int, num_tokens: int, max_tokens: int) -> list[int]: ...

    def tokens(self, prompt: Sequence[int], max_tokens: int) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    prompt: list[int]
    max_tokens: int


class Traffic:
    """Asks and checks. Every answer must be right as far as it goes, and none may hang."""

    def __init__(self, cluster: Cluster, expected: Expected, *, seed: int) -> None:
        self.rng = random.Random(seed)
        self._cluster = cluster
        self._expected = expected
        self._num_asked: Counter[tuple[int, int]] = Counter()

    def asks(self, number: int, *, prompt_tokens: int, max_tokens: int) -> list[Ask]:
        """Prompts that this cluster has not seen."""
        asks = []
        for _ in range(number):
            index = self._num_asked[prompt_tokens, max_tokens]
            self._num_asked[prompt_tokens, max_tokens] += 1
            asks.append(Ask(self._expected.prompt(index, prompt_tokens, max_tokens), max_tokens))
        return asks

    def send(self, asks: Sequence[Ask]) -> list[asyncio.Task[Answer]]:
        return [
            asyncio.create_task(self._cluster.generate(ask.prompt, ask.max_tokens)) for ask in asks
        ]

    async def finish(
        self,
        asks: Sequence[Ask],
        sent: Sequence[asyncio.Task[Answer]],
        *,
        may_fail: bool = False,
    ) -> list[Answer]:
        """Wait for the answers and check them; with `may_fail` a clean error is fine too."""
        answers = list(await asyncio.gather(*sent))
        for ask, answer in zip(asks, answers, strict=True):
            self.check(ask, answer, may_fail=may_fail)
        return answers

    async def run(self, asks: Sequence[Ask]) -> list[Answer]:
        return await self.finish(asks, self.send(asks))

    def check(self, ask: Ask, answer: Answer, *, may_fail: bool = False) -> None:
        expected, got = self._expected.tokens(ask.prompt, ask.max_tokens), answer.token_ids
        where = f"{answer}\nexpected {expected}\n{self._cluster.logs()}"
        assert got == expected[: len(got)], f"wrong tokens: {where}"
        assert not answer.is_hung, f"hung: {where}"
        assert answer.is_complete or (may_fail and answer.error), f"not complete: {where}"

    async def until_moving(self, owner: str, *, timeout_s: float = 20.0) -> None:
        """Returns when `owner` has leased blocks, and a random moment later."""
        async with asyncio.timeout(timeout_s):
            while not (await self._cluster.info(owner)).load.leases:
                await asyncio.sleep(0.005)
        await asyncio.sleep(self.rng.uniform(0, 0.1))
