"""Everything at once between three workers: hand-offs, fetches, takeovers, cancels, restores."""

import asyncio
import random

import pytest

from baton.core.lifecycle import LifecycleEvent, Timeline
from baton.core.request import FinishReason, Work
from baton.core.worker_info import Role
from kvtransfer.tiers.config import TierConfig

NUM_REQUESTS = 150
TIERS = TierConfig(host_bytes=1 << 14, save_below_free_ratio=0.8)


def slow(worker):
    """The worker has found that it computes slowly: fetches and restores pay."""
    points = {LifecycleEvent.PREFILL_STARTED: 0.0, LifecycleEvent.PREFILL_ENDED: 100.0}
    worker.server.parts.imports.computed(10000, Timeline(points))


class Client:
    """One request of a random kind, as a router would run it."""

    def __init__(self, workers, routers, make_request, rng):
        self.workers = workers
        self.routers = routers
        self.make_request = make_request
        self.rng = rng

    async def run(self, name):
        rng = self.rng
        family = [rng.randrange(20)] * rng.choice([0, 12, 24, 40])
        prompt = (*family, *[rng.randrange(6) for _ in range(9)])
        max_tokens = rng.randrange(2, 60)
        kind = rng.choice(["local", "hand-off", "move", "move"])
        a, b = rng.sample(range(3), 2)
        fields = {"max_tokens": max_tokens}
        if kind == "hand-off":
            await self.submit(b, name, prompt, work=Work.DECODE, peer=self.peer(a), **fields)
            await self.submit(a, name, prompt, work=Work.PREFILL, peer=self.peer(b), **fields)
        else:
            await self.submit(a, name, prompt, peer=self.peer(b), **fields)
        is_cancelled = rng.random() < 0.25
        await asyncio.sleep(rng.uniform(0, 0.1))
        if kind == "move" and not self.routers[a].ends(name):
            known = tuple(self.routers[a].tokens(name))
            fields["output_token_ids"] = known
            await self.submit(b, name, prompt, work=Work.TAKEOVER, peer=self.peer(a), **fields)
        if is_cancelled:
            await asyncio.sleep(rng.uniform(0, 0.05))
            for index in (a, b):
                await self.routers[index].cancel(name)
        for index in (a, b):
            if kind != "local" or index == a:
                if kind == "move" and index == b and name not in self.submitted(b):
                    continue
                await self.routers[index].ended(name, timeout_s=30)
        return prompt, max_tokens, self.tokens(name, a, b), is_cancelled, kind

    def submitted(self, index):
        return self.routers[index].names

    def peer(self, index):
        return self.workers[index].peer

    def tokens(self, name, a, b):
        """Of both workers, in order; what came twice shows as a wrong token."""
        firsts = [
            (self.routers[i].deltas[name][0].first_index, self.routers[i].tokens(name))
            for i in (a, b)
            if self.routers[i].tokens(name)
        ]
        return [token for _, tokens in sorted(firsts) for token in tokens]

    async def submit(self, index, name, prompt, **fields):
        router = self.routers[index]
        router.names.add(name)
        await router.submit(self.make_request(name, prompt, **fields))


async def break_streams(workers, rng):
    """The streams between workers break again and again."""
    while True:
        await asyncio.sleep(rng.uniform(0, 0.1))
        rng.choice(workers).server.parts.leases.close()


@pytest.mark.parametrize("has_broken_streams", [False, True], ids=["calm", "broken-streams"])
@pytest.mark.parametrize("seed", [11, 12])
async def test_random_mix_keeps_every_stream_right_and_leaves_nothing(
    workers, make_request, expected, seed, has_broken_streams
):
    started = [
        await workers.start(
            role,
            num_blocks=96,
            step_s=0.001,
            max_num_seqs=8,
            max_in_flight=depth,
            lease_s=3.0,
            tiers=TIERS,
        )
        for role, depth in ((Role.PREFILL, 1), (Role.DECODE, 2), (Role.DECODE, 1))
    ]
    routers = [await worker.router() for worker in started]
    peers = [worker.peer for worker in started]
    for worker, router in zip(started, routers, strict=True):
        await router.tell_peers(*peers)
        slow(worker)
    client = Client(started, routers, make_request, random.Random(seed))
    slots = asyncio.Semaphore(10)
    num_whole = 0

    async def one(number):
        nonlocal num_whole
        async with slots:
            prompt, max_tokens, tokens, is_cancelled, kind = await client.run(f"r{number}")
        whole = expected(prompt, max_tokens)
        assert tokens == whole[: len(tokens)], (number, kind)
        if not is_cancelled:
            num_whole += tokens == whole

    breaking = asyncio.create_task(break_streams(started, random.Random(seed)))
    if not has_broken_streams:
        breaking.cancel()
    await asyncio.gather(*(one(number) for number in range(NUM_REQUESTS)))
    breaking.cancel()
    assert num_whole > NUM_REQUESTS // 2
    for worker in started:
        await worker.assert_nothing_leaked(timeout_s=20)
    counters = [worker.server.parts.fabric.report().counters for worker in started]
    assert sum(each.takeovers for each in counters) > 0
    assert sum(each.fetched_blocks for each in counters) > 0
    for router in routers:
        for name in router.names:
            (end,) = router.ends(name)
            assert end.finish_reason is not FinishReason.ERROR or end.is_retryable
