"""Workers that die, stall, refuse or lie: the client sees a pause or a clean error, never a hang,
a lost token or one twice."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time

import pytest

from baton.core.errors import (
    DeadlineExceeded,
    InternalError,
    NoWorker,
    Overloaded,
    Unavailable,
    WorkerLost,
)
from baton.core.request import Work
from services.router.config import MigrationConfig

LONG = list(range(1, 101))
SHORT = [5, 6, 7]


async def run(cluster, prompt, max_tokens=10, **kw):
    async with asyncio.timeout(10):
        return await cluster.generate(prompt, max_tokens, **kw)


# A worker is killed at each stage.


async def test_prefill_killed_on_submit(cluster):
    cluster["p0"].faults.kill_on_submit = True
    cluster.assert_right(await run(cluster, LONG), LONG, 10)
    assert cluster["d0"].submitted[-1].work is Work.GENERATE
    await cluster.settled()


async def test_prefill_killed_before_first_token_is_replaced(make_cluster):
    cluster = await make_cluster(2, 1)
    first, second = cluster["p0"], cluster["p1"]
    # Whichever gets the request first dies, the other does not.
    first.faults = second.faults
    first.faults.kill_at, first.faults.kills_left = 0, 1
    cluster.assert_right(await run(cluster, LONG), LONG, 10)
    # The next worker is the other one, or the decode worker when its report came first.
    assert len(first.submitted) <= 1 and len(second.submitted) <= 1
    await cluster.settled()


async def test_prefill_killed_after_first_token_while_kv_is_read(cluster):
    cluster["d0"].faults.hold_kv = True
    task = asyncio.create_task(run(cluster, LONG))
    while not cluster.kv.held:
        await asyncio.sleep(0.005)
    await cluster["p0"].kill()
    cluster["d0"].faults.hold_kv = False
    cluster.assert_right(await task, LONG, 10)
    replay = cluster["d0"].submitted[-1]
    assert replay.work is Work.GENERATE and len(replay.output_token_ids) == 1


async def test_prefill_killed_after_the_hand_off_is_not_noticed(cluster):
    task = asyncio.create_task(run(cluster, LONG, 60))
    while not (live := list(cluster["d0"].live.values())) or live[0].index < 5:
        await asyncio.sleep(0.002)
    await cluster["p0"].kill()
    cluster.assert_right(await task, LONG, 60)
    assert len(cluster["d0"].submitted) == 1


async def test_decode_killed_on_submit(cluster):
    cluster["d0"].faults.kill_on_submit = True
    cluster.assert_right(await run(cluster, LONG), LONG, 10)
    await cluster.settled()


@pytest.mark.parametrize("position", [1, 2, 8])
async def test_decode_killed_in_mid_stream_continues_on_another(make_cluster, position):
    cluster = await make_cluster(1, 2)
    for name in ("d0", "d1"):
        cluster[name].faults.kill_at = position
    task = asyncio.create_task(run(cluster, LONG))
    while not (victim := [w for w in (cluster["d0"], cluster["d1"]) if w.submitted]):
        await asyncio.sleep(0.001)
    other = cluster["d1" if victim[0].worker_id == "d0" else "d0"]
    other.faults.kill_at = None
    cluster.assert_right(await task, LONG, 10)
    assert list(other.submitted[-1].output_token_ids) == [
        ord("a") + (sum(LONG) + k) % 26 for k in range(position)
    ]
    await cluster.settled()


async def test_last_decode_worker_killed_lets_prefill_do_all_of_it(cluster):
    cluster["d0"].faults.kill_at = 4
    cluster.assert_right(await run(cluster, LONG), LONG, 10)
    replay = cluster["p0"].submitted[-1]
    assert replay.work is Work.GENERATE and len(replay.output_token_ids) == 4


async def test_local_prefill_killed_in_mid_stream(cluster):
    cluster["d0"].faults.kill_at = 3
    cluster.assert_right(await run(cluster, SHORT), SHORT, 10)


async def test_all_killed_and_one_back_in_time(make_cluster):
    cluster = await make_cluster(0, 1)
    cluster["d0"].faults.kill_at = 3
    task = asyncio.create_task(run(cluster, LONG))
    while cluster["d0"].is_alive:
        await asyncio.sleep(0.005)
    await cluster["d0"].close()
    await cluster["d0"].revive()
    cluster.assert_right(await task, LONG, 10)


async def test_all_killed_for_good_is_an_error_in_bounded_time(cluster):
    cluster["p0"].faults.kill_at = 0
    cluster["d0"].faults.kill_on_submit = True
    with pytest.raises(Unavailable):
        await run(cluster, LONG)
    assert cluster.core.dispatcher.num_in_flight == 0


async def test_system_serves_again_after_a_restart(cluster):
    cluster["d0"].faults.kill_at = 2
    await run(cluster, LONG)
    await cluster["d0"].close()
    await cluster["d0"].revive()
    await cluster.connected("p0", "d0")
    cluster.assert_right(await run(cluster, LONG), LONG, 10)
    assert cluster["d0"].submitted[-1].work is Work.DECODE


async def test_replay_keeps_text_stop_strings_seed_and_logprobs(make_cluster):
    cluster = await make_cluster(1, 1)
    seed = 11
    text = bytes(ord("a") + (sum(LONG) + seed + k) % 26 for k in range(20)).decode()
    # The worker dies inside the stop string, which is held back at that moment.
    cluster["d0"].faults.kill_at = 6
    outcome = await run(
        cluster, LONG, 50, stop=(text[4:9],), seed=seed, temperature=1.0, logprobs=0
    )
    assert outcome.text == text[:4]
    assert outcome.stop_reason == text[4:9]
    assert [e.token_id for e in outcome.logprobs] == outcome.token_ids
    assert [e.logprob for e in outcome.logprobs] == [-float(k) for k in range(9)]


async def test_drawn_seed_survives_a_replay(cluster):
    cluster["d0"].faults.kill_at = 5
    outcome = await run(cluster, LONG, 12, temperature=1.0)
    seeds = {r.sampling.seed for w in ("p0", "d0") for r in cluster[w].submitted}
    assert len(seeds) == 1
    seed = seeds.pop()
    assert outcome.token_ids == [ord("a") + (sum(LONG) + seed + k) % 26 for k in range(12)]


async def test_character_split_by_a_replay_stays_whole(cluster):
    data = "aé🎉ñz".encode()
    for worker in cluster.workers.values():
        worker.tokens_of = lambda request, k: data[k]
    cluster["d0"].faults.kill_at = 5
    outcome = await run(cluster, SHORT, len(data))
    assert outcome.text == "aé🎉ñz"


# Errors that workers report.


async def test_retryable_prefill_error_moves_on(cluster):
    cluster["p0"].faults.error_at = 0
    cluster.assert_right(await run(cluster, LONG), LONG, 10)
    await cluster.settled()
    # The decode worker of the given-up attempt was told.
    assert cluster["d0"].cancelled == [cluster["d0"].submitted[0].request_id]


async def test_retryable_decode_error_before_its_first_token_avoids_the_hand_off(cluster):
    cluster["d0"].faults.error_at, cluster["d0"].faults.errors_left = 1, 1
    cluster["d0"].faults.hold_kv = True
    task = asyncio.create_task(run(cluster, LONG))
    # The two workers' messages come in any order; here the end of the prefill comes first.
    while cluster.core.dispatcher._follower.last_token_at_s is None:
        await asyncio.sleep(0.002)
    cluster["d0"].faults.hold_kv = False
    cluster.assert_right(await task, LONG, 10)
    assert cluster["d0"].submitted[-1].work is Work.GENERATE


async def test_refusing_decode_worker_is_avoided_itself(make_cluster):
    cluster = await make_cluster(1, 2)
    cluster["d0"].faults.refuse = cluster["d1"].faults.refuse = "queue is full"
    task = asyncio.create_task(run(cluster, LONG))
    while not (first := [w for w in (cluster["d0"], cluster["d1"]) if w.submitted]):
        await asyncio.sleep(0)
    other = cluster["d1" if first[0].worker_id == "d0" else "d0"]
    other.faults.refuse = ""
    cluster.assert_right(await task, LONG, 10)
    assert len(first[0].submitted) == 1
    assert [r.work for r in other.submitted] == [Work.DECODE]


async def test_retries_are_bounded(cluster):
    for worker in cluster.workers.values():
        worker.faults.refuse = "queue is full"
    with pytest.raises(WorkerLost, match="4 placements"):
        await run(cluster, LONG)
    await cluster.settled()


async def test_hopeless_error_is_not_retried(cluster):
    cluster["d0"].faults.error_at, cluster["d0"].faults.error_is_retryable = 2, False
    with pytest.raises(InternalError) as error:
        await run(cluster, SHORT)
    assert "scripted" not in str(error.value)
    assert len(cluster["d0"].submitted) == 1


async def test_gap_in_the_positions_is_repaired(cluster):
    cluster["d0"].faults.skip_at = 4
    task = asyncio.create_task(run(cluster, LONG))
    while len(cluster["d0"].submitted) + len(cluster["p0"].submitted) < 3:
        await asyncio.sleep(0.001)
    cluster["d0"].faults.skip_at = None
    cluster.assert_right(await task, LONG, 10)


async def test_lost_news_of_the_end_needs_no_worker(cluster):
    cluster["d0"].faults.forgets_the_end = True
    cluster["d0"].faults.error_at = 6
    cluster.assert_right(await run(cluster, SHORT, 6), SHORT, 6)
    assert len(cluster["d0"].submitted) == 1 and not cluster["p0"].submitted


async def test_draining_worker_gets_no_new_work(make_cluster):
    cluster = await make_cluster(1, 2)
    cluster["d0"].load = dataclasses.replace(cluster["d0"].load, is_draining=True)
    cluster["d0"].report()
    await asyncio.sleep(0.1)
    for _ in range(8):
        await run(cluster, LONG, 3)
    assert not cluster["d0"].submitted


# Silence.


@pytest.mark.parametrize("name", ["p0", "d0"])
async def test_stopped_process_is_noticed_by_its_silence(cluster, name):
    cluster[name].faults.is_frozen = True
    cluster.assert_right(await run(cluster, LONG), LONG, 10)
    cluster[name].faults.is_frozen = False
    await cluster.connected("p0", "d0")


async def test_worker_without_progress_is_given_up_though_it_reports(cluster):
    cluster["d0"].faults.is_stalled = True
    cluster.assert_right(await run(cluster, LONG), LONG, 10)
    states = {w.info.worker_id: w.is_quarantined for w in cluster.core.pool.view().workers}
    assert states == {"p0": False, "d0": True}
    cluster["d0"].faults.is_stalled = False
    await cluster.connected("p0", "d0")


async def test_waiting_decode_worker_is_not_blamed_for_a_slow_prefill(cluster):
    cluster["p0"].faults.is_stalled = True
    cluster.assert_right(await run(cluster, LONG), LONG, 10)
    states = {w.info.worker_id: w.is_quarantined for w in cluster.core.pool.view().workers}
    assert states == {"p0": True, "d0": False}


async def test_router_that_stood_still_itself_does_not_blame_the_workers(cluster):
    task = asyncio.create_task(run(cluster, LONG, 30))
    await asyncio.sleep(0.02)
    time.sleep(1.2)
    cluster.assert_right(await task, LONG, 30)
    assert sum(len(w.submitted) for w in cluster.workers.values()) == 2


async def test_deadline_ends_a_request_with_an_error(make_cluster):
    cluster = await make_cluster(1, 1)
    cluster["d0"].faults.hold_kv = True
    started = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineExceeded, match=r"0\.4 s"):
        await run(cluster, LONG, deadline_s=0.4)
    assert asyncio.get_running_loop().time() - started < 0.6
    await cluster.settled()
    assert cluster["d0"].cancelled and cluster["p0"].cancelled


async def test_deadline_also_bounds_the_wait_for_a_worker(make_cluster):
    cluster = await make_cluster(0, 0)
    with pytest.raises((DeadlineExceeded, NoWorker)):
        async with asyncio.timeout(0.8):
            await cluster.generate(SHORT, deadline_s=0.2)


async def test_stopping_router_ends_running_requests(make_cluster):
    cluster = await make_cluster(1, 1)
    cluster["d0"].faults.hold_kv = True
    task = asyncio.create_task(cluster.generate(LONG))
    while not cluster.kv.held:
        await asyncio.sleep(0.005)
    await asyncio.wait_for(cluster.core.stop(), 4)
    with pytest.raises(Unavailable, match="stopping"):
        await task


async def test_worker_that_leaves_the_membership_finishes_its_requests(make_cluster, config):
    config = dataclasses.replace(config, migration=MigrationConfig(enabled=False))
    cluster = await make_cluster(0, 2, config=config)
    task = asyncio.create_task(run(cluster, LONG, 100))
    while not (busy := [w for w in cluster.workers.values() if w.live]):
        await asyncio.sleep(0.002)
    idle = next(w for w in cluster.workers.values() if w is not busy[0])
    cluster.membership.update({idle.worker_id: idle.address})
    await run(cluster, SHORT, 3)
    assert len(idle.submitted) == 1
    cluster.assert_right(await task, LONG, 100)
    assert len(busy[0].submitted) == 1
    while len(cluster.core.pool._sessions) > 1:
        await asyncio.sleep(0.01)


# Cancels.


@pytest.mark.parametrize("state", ["placing", "prefill", "hand-off", "decode", "local"])
async def test_cancel_reaches_both_workers_in_every_state(make_cluster, config, state):
    # A session that is lost meanwhile has nobody to tell.
    session = dataclasses.replace(config.session, idle_timeout_s=30.0)
    cluster = await make_cluster(1, 1, config=dataclasses.replace(config, session=session))
    p, d = cluster["p0"], cluster["d0"]
    prompt = SHORT if state == "local" else LONG
    if state == "placing":
        await p.kill()
        await d.kill()
        await asyncio.sleep(0.05)
    elif state == "prefill":
        p.faults.is_stalled = True
    elif state == "hand-off":
        d.faults.hold_kv = True
    task = asyncio.create_task(cluster.generate(prompt, 1000))
    await asyncio.sleep(0.1)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    p.faults.is_stalled = False
    await cluster.settled()
    wire_ids = [r.request_id for r in d.submitted]
    if state == "placing":
        assert not wire_ids
        return
    assert d.cancelled == wire_ids and len(wire_ids) == 1
    # After the hand-off there is nothing left to cancel on the prefill worker.
    assert p.cancelled == (wire_ids if state in ("prefill", "hand-off") else [])
    assert not cluster.kv.held


async def test_closing_the_iterator_cancels(cluster):
    stream = cluster.stream(cluster.input(LONG, 1000))
    for _ in range(3):
        await anext(stream)
    await stream.aclose()
    await cluster.settled()
    assert len(cluster["d0"].cancelled) == 1


async def test_slow_client_neither_blocks_others_nor_loses_tokens(cluster):
    stream = cluster.stream(cluster.input(LONG, 300))
    first = await anext(stream)
    cluster.assert_right(await run(cluster, LONG, 20), LONG, 20)
    while cluster["d0"].live:
        await asyncio.sleep(0.01)
    rest = [d async for d in stream]
    assert sum(len(d.token_ids) for d in [first, *rest]) == 300
    assert len(rest) < 200


async def test_slow_client_of_a_finished_request_is_no_reason_to_blame_its_worker(cluster):
    stream = cluster.stream(cluster.input(LONG, 30))
    first = await anext(stream)
    while cluster["d0"].live:
        await asyncio.sleep(0.01)
    # Longer than the workers may be without progress while they have requests.
    await asyncio.sleep(1.0)
    assert not any(w.is_quarantined for w in cluster.core.pool.view().workers)
    rest = [d async for d in stream]
    assert sum(len(d.token_ids) for d in [first, *rest]) == 30
    assert not any(w.is_quarantined for w in cluster.core.pool.view().workers)


# Everything at once.


@pytest.mark.parametrize("seed", [1, 2])
async def test_mixed_requests_with_cancels_and_faults_all_end(make_cluster, seed):
    rng = random.Random(seed)
    cluster = await make_cluster(2, 2)
    for worker in cluster.workers.values():
        worker.step_s = 0.005
    slots = asyncio.Semaphore(16)
    faults = dict.fromkeys(("kill", "error", "refuse", "freeze", "skip"), 0)
    counts = {"right": 0, "cancelled": 0, "error": 0}

    async def one(number: int) -> None:
        prompt = [rng.randrange(1, 100) for _ in range(rng.choice((3, 40, 100, 300)))]
        max_tokens = rng.choice((1, 2, 10, 100))
        cancel_after_s = rng.choice((None, None, None, rng.uniform(0, 0.1)))
        async with slots:
            counts[await cluster.ended(prompt, max_tokens, cancel_after_s=cancel_after_s)] += 1

    async def trouble() -> None:
        while True:
            await asyncio.sleep(rng.uniform(0.0, 0.05))
            worker = rng.choice(list(cluster.workers.values()))
            fault = rng.choice(sorted(faults))
            faults[fault] += 1
            if fault == "kill" and worker.is_alive:
                await worker.kill()
                await asyncio.sleep(rng.uniform(0.05, 0.2))
                await worker.revive()
            elif fault == "error":
                worker.faults.error_at, worker.faults.errors_left = rng.choice((0, 1, 3)), 3
            elif fault == "refuse":
                worker.faults.refuse = "queue is full"
            elif fault == "freeze":
                worker.faults.is_frozen = True
            elif fault == "skip":
                worker.faults.skip_at = 5
            await asyncio.sleep(0.1)
            worker.faults.refuse, worker.faults.is_frozen = "", False
            worker.faults.skip_at = worker.faults.error_at = None

    troublemaker = asyncio.create_task(trouble())
    async with asyncio.timeout(60):
        await asyncio.gather(*(one(n) for n in range(300)))
    troublemaker.cancel()
    await asyncio.gather(troublemaker, return_exceptions=True)
    await cluster.settled()
    assert sum(counts.values()) == 300
    assert counts["right"] > 150, counts
    assert sum(faults.values()) > 10, faults
    dispatcher = cluster.core.dispatcher
    assert not dispatcher._flights
    for session in cluster.core.pool._sessions.values():
        assert not session._requests
    assert "baton_requests_running 0.0" in cluster.core.metrics.render().decode()


# Workers without room.


@pytest.mark.parametrize("prompt", [LONG, SHORT])
async def test_full_workers_make_the_request_an_overload_at_once(make_cluster, prompt):
    cluster = await make_cluster(2, 2)
    for worker in cluster.workers.values():
        worker.faults.is_full = True
    started_at = time.monotonic()
    with pytest.raises(Overloaded) as caught:
        await run(cluster, prompt)
    assert caught.value.retry_after_s > 0
    assert time.monotonic() - started_at < 2
    await cluster.settled()


async def test_overload_on_more_workers_than_there_are_retries(make_cluster):
    cluster = await make_cluster(0, 6)
    for worker in cluster.workers.values():
        worker.faults.is_full = True
    with pytest.raises(Overloaded):
        await run(cluster, SHORT)
    assert sum(len(w.submitted) for w in cluster.workers.values()) == 4


async def test_worker_with_room_takes_what_full_ones_refuse(make_cluster):
    cluster = await make_cluster(1, 3)
    for name in ("p0", "d0", "d1"):
        cluster[name].faults.is_full = True
    cluster.assert_right(await run(cluster, LONG), LONG, 10)
    assert cluster["d2"].submitted


async def test_full_decode_worker_leaves_the_request_to_the_prefill_worker(cluster):
    cluster["d0"].faults.is_full = True
    cluster.assert_right(await run(cluster, LONG), LONG, 10)
    assert cluster["p0"].submitted[-1].work is Work.GENERATE


async def test_started_request_waits_for_room(make_cluster):
    cluster = await make_cluster(0, 2)
    for worker in cluster.workers.values():
        worker.faults.kill_at = 3
    request = cluster.generate(SHORT, 10)
    task = asyncio.create_task(request)
    while not (first := next((w for w in cluster.workers.values() if w.submitted), None)):
        await asyncio.sleep(0.001)
    other = next(w for w in cluster.workers.values() if w is not first)
    other.faults.kill_at, other.faults.is_full = None, True
    while not other.submitted:
        await asyncio.sleep(0.001)
    other.faults.is_full = False
    async with asyncio.timeout(5):
        cluster.assert_right(await task, SHORT, 10)
    assert len(other.submitted) > 1
