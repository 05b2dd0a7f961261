"""From requests to submits: what placement remembers between them, with real sessions."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from services.router.placement.policy_config import PolicyConfig, PolicyName

PROMPT = list(range(1, 201))


def with_policy(config, **policy):
    return dataclasses.replace(
        config, policy=PolicyConfig(**{"local_prefill_max_tokens": 0, **policy})
    )


def computed(cluster):
    """How many prompts each prefill worker was given."""
    names = sorted(name for name in cluster.workers if name.startswith("p"))
    return [len(cluster[name].submitted) for name in names]


async def test_siblings_of_a_burst_go_where_the_first_one_went(make_cluster, config):
    """No KV event tells of the prefix; it is predicted from the placement."""
    cluster = await make_cluster(4, 2, config=with_policy(config))
    first = await cluster.generate(PROMPT, 3)
    cluster.assert_right(first, PROMPT, 3)
    for _ in range(5):
        await cluster.generate(PROMPT, 3)
    assert sorted(computed(cluster)) == [0, 0, 0, 6]
    # Another prompt goes anywhere.
    for n in range(12):
        await cluster.generate([7 + n] * 100, 2)
    assert computed(cluster).count(0) < 3
    await cluster.settled()


async def test_conversation_stays_with_its_workers(make_cluster, config):
    cluster = await make_cluster(3, 3, config=with_policy(config))
    for n in range(6):
        turn = cluster.input([n + 1] * 60, 2)
        await cluster.run(dataclasses.replace(turn, session_key="talk"))
    assert sorted(computed(cluster)) == [0, 0, 6]
    decodes = [len(cluster[f"d{i}"].submitted) for i in range(3)]
    assert sorted(decodes) == [0, 0, 6]
    await cluster.settled()


async def test_requests_in_flight_count_at_once_and_leave_nothing_behind(make_cluster, config):
    cluster = await make_cluster(2, 2, config=with_policy(config))
    prompts = [[n + 1] * 100 for n in range(12)]
    outcomes = await asyncio.gather(*(cluster.generate(prompt, 5) for prompt in prompts))
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        cluster.assert_right(outcome, prompt, 5)
    assert min(computed(cluster)) >= 4
    await cluster.settled()
    table = cluster.core.pool.table
    table.check_integrity()
    assert all(row.book.num_in_flight == 0 for row in table.rows())
    await asyncio.sleep(0.1)
    await cluster["p0"].kill()
    async with asyncio.timeout(3):
        while len(table.pools("fake")[0].candidates) != 3:
            await asyncio.sleep(0.01)
    table.check_integrity()
    await cluster["p0"].revive()
    await cluster.connected()
    assert len(table.pools("fake")[0].candidates) == 4
    table.check_integrity()


@pytest.mark.parametrize("name", list(PolicyName))
async def test_every_policy_serves(make_cluster, config, name):
    cluster = await make_cluster(2, 2, config=with_policy(config, name=name))
    for n in range(4):
        prompt = [n + 1] * 70
        cluster.assert_right(await cluster.generate(prompt, 3), prompt, 3)
    await cluster.settled()


async def test_finished_requests_teach_the_model(cluster):
    for n in range(10):
        await cluster.generate([n + 1] * 100, 12)
    perf = cluster.core.perf
    # The fake prefill worker says half a second for each prompt.
    role = cluster["p0"].role
    assert perf.prefill_s(role, 100) == pytest.approx(0.5, rel=0.3)
    exported = await cluster.rendered("baton_perf_model_error_ratio")
    assert 'quantity="prefill",role="prefill"' in exported
