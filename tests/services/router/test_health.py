from __future__ import annotations

import asyncio
import dataclasses

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import LoadReport, Role, WorkerInfo
from services.router.config import HealthConfig
from services.router.health import Observations, assess
from services.router.workers.cluster_view import WorkerState

LAYOUT = KvLayout("m", 2, 1, 8, 16, "float32")
CONFIG = HealthConfig()


def worker(role, **kw):
    info = WorkerInfo(role.value, "1", role, "h:1", "m", LAYOUT, 10, 100, 4, "fake", 1)
    return WorkerState(info, LoadReport(), **kw)


P, D = worker(Role.PREFILL), worker(Role.DECODE)


def judge(workers=(P, D), config=CONFIG, **seen):
    health = assess(Observations(workers, **seen), config)
    return health.is_ready, health.reason


def test_idle_workers_of_both_pools_are_green():
    assert judge() == (True, "idle, workers answer")


def test_recent_token_is_green():
    assert judge(num_in_flight=3, token_age_s=0.1, oldest_wait_s=60) == (
        True,
        "tokens are produced",
    )


def test_work_without_progress_is_red_with_its_reason():
    ready, reason = judge(num_in_flight=3, oldest_wait_s=30, token_age_s=31, progress_age_s=40)
    assert not ready and reason == "3 requests in flight, no progress for 30 s"


def test_long_prefill_that_progresses_is_green():
    assert judge(num_in_flight=1, oldest_wait_s=30, progress_age_s=0.5)[0]
    assert judge(num_in_flight=1, oldest_wait_s=2, progress_age_s=900)[0]


def test_missing_pool_is_red_when_idle_and_degraded_while_it_serves():
    assert judge((P,)) == (False, "no decode worker answers")
    assert judge((P,), token_age_s=1.0) == (True, "degraded: no decode worker answers")
    assert judge((D,), config=dataclasses.replace(CONFIG, required_roles=(Role.DECODE,)))[0]


def test_stale_draining_or_quarantined_workers_do_not_answer():
    stale = dataclasses.replace(D, load_age_s=4.0)
    draining = dataclasses.replace(D, load=LoadReport(is_draining=True))
    lost = dataclasses.replace(D, is_quarantined=True)
    for broken in (stale, draining, lost):
        assert judge((P, broken)) == (False, "no decode worker answers")
    assert judge((lost,), token_age_s=0.1) == (False, "none of 1 known workers answers")
    assert judge(()) == (False, "none of 0 known workers answers")


async def test_router_health_follows_the_cluster(cluster):
    health = await cluster.core.dispatcher.health()
    assert health.is_ready and health.detail["workers_answering"] == {"prefill": 1, "decode": 1}
    await cluster.generate([1, 2, 3], 3)
    assert (await cluster.core.dispatcher.health()).reason == "tokens are produced"
    await cluster["p0"].kill()
    await cluster["d0"].kill()
    async with asyncio.timeout(3):
        while (await cluster.core.dispatcher.health()).is_ready:
            await asyncio.sleep(0.01)
