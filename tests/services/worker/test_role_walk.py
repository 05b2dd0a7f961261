"""Requests of all kinds while workers change their roles at random: each ends once, with the right
tokens or handed back, and nothing is left."""

from __future__ import annotations

import asyncio
import random

import pytest

from baton.core.errors import BatonError
from baton.core.request import FinishReason, Work
from baton.core.worker_info import Role
from baton.rpc.convert import request_to_wire
from baton.rpc.role_change import change_role

NUM_WORKERS = 3
NUM_STEPS = 60


class Walk:
    def __init__(self, rng, servers, routers, make_request, expected):
        self.rng = rng
        self.servers = servers
        self.routers = routers
        self._make_request = make_request
        self._expected = expected
        self._num_sent = 0
        self.sent = {}
        """name -> (routers it was sent to, prompt, tokens)."""
        self.changing = set()

    async def step(self):
        act = self.rng.choice((self.generate, self.generate, self.hand_off, self.cancel,
                               self.change, self.change))  # fmt: skip
        await act()
        await asyncio.sleep(self.rng.uniform(0, 0.05))

    def _new(self):
        self._num_sent += 1
        prompt = tuple(self.rng.randrange(1, 90) for _ in range(self.rng.randint(5, 40)))
        return f"r{self._num_sent}", prompt, self.rng.randint(1, 25)

    async def _submit(self, at, message):
        # As of now, as a router does; now and then what an older one would say.
        version = self.routers[at].info.role_version
        message.role_version = self.rng.choice((version, version, version, version - 1))
        await self.routers[at].submit_wire(message)

    async def generate(self):
        (name, prompt, num), at = self._new(), self.rng.randrange(NUM_WORKERS)
        self.sent[name] = ((at,), prompt, num)
        await self._submit(at, request_to_wire(self._make_request(name, prompt, max_tokens=num)))

    async def hand_off(self):
        name, prompt, num = self._new()
        owner, reader = self.rng.sample(range(NUM_WORKERS), 2)
        self.sent[name] = ((owner, reader), prompt, num)
        peer = self.servers[owner].peer
        reading = self._make_request(name, prompt, work=Work.DECODE, peer=peer, max_tokens=num)
        await self._submit(reader, request_to_wire(reading))
        computing = self._make_request(name, prompt, work=Work.PREFILL, max_tokens=num)
        await self._submit(owner, request_to_wire(computing))

    async def cancel(self):
        if self.sent:
            name = self.rng.choice(sorted(self.sent))
            for at in self.sent[name][0]:
                await self.routers[at].cancel(name)

    async def change(self):
        server = self.rng.choice(self.servers)
        role, timeout_s = self.rng.choice(list(Role)), self.rng.choice((0.05, 5.0))
        change = change_role(server.info.address, role, timeout_s=timeout_s)
        task = asyncio.create_task(change)
        self.changing.add(task)

    async def check(self):
        for end in await asyncio.gather(*self.changing, return_exceptions=True):
            assert not isinstance(end, Exception) or isinstance(end, BatonError), repr(end)
        for name, (places, _, _) in self.sent.items():
            if any(end.is_handed_back for at in places for end in self.routers[at].ends(name)):
                # As its router does with a placement that has ended.
                for at in places:
                    await self.routers[at].cancel(name)
        num_whole = 0
        for name, (places, prompt, num) in self.sent.items():
            ends = [await self.routers[at].ended(name) for at in places]
            tokens = [t for at in places for t in self.routers[at].tokens(name)]
            whole = self._expected(prompt, num)
            if ends[-1].finish_reason is FinishReason.LENGTH:
                assert tokens == whole, name
                num_whole += 1
            else:
                assert tokens == whole[: len(tokens)], name
                # A read that a slow machine gives up is no business of roles.
                may_fail = len(places) == 2
                given_up = [e.is_handed_back or (may_fail and e.is_retryable) for e in ends]
                cancelled = [end.finish_reason is FinishReason.CANCELLED for end in ends]
                assert any(given_up) or any(cancelled), (name, ends)
        return num_whole


@pytest.mark.parametrize("seed", range(3))
async def test_walk(workers, make_request, expected, wait_for, seed):
    rng = random.Random(seed)
    roles = [Role.PREFILL, Role.DECODE, Role.DECODE]
    servers = [await workers.start(r, registry=True, step_s=0.003, num_blocks=40) for r in roles]
    routers = [await server.router() for server in servers]
    walk = Walk(rng, servers, routers, make_request, expected)
    for _ in range(NUM_STEPS):
        await walk.step()
    assert await walk.check() > 0
    for server, router in zip(servers, routers, strict=True):
        await wait_for(lambda s=server, r=router: s.info == r.info and not r.load.is_draining)
        await server.assert_nothing_leaked()
