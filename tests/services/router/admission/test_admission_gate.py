"""Admission in front of real sessions to fake workers."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from baton.core.errors import (
    DeadlineExceeded,
    NoWorker,
    Overloaded,
    QuotaExceeded,
    RequestCancelled,
    Unavailable,
    WorkerLost,
)
from services.router.admission.admission import Pumped
from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.slo import SloTargets
from services.router.admission.ticket import Refusal
from services.router.shared.state import QuotaLimits

LONG = list(range(1, 101))
HOUR = 10**8
"""Tokens in a worker's queue that take longer than any test."""
STRICT = SloTargets(ttft_s=0.5)


@pytest.fixture
async def assert_nothing_left():
    """Call it with a cluster at the end of a test."""

    async def check(cluster):
        await cluster.settled()
        gate = cluster.core.gate
        gate.check_integrity()
        assert not gate.num_waiting and not gate._entrants and not gate._foresight.num_running
        for lane in gate._lanes.values():
            assert not lane.queue and not lane.num_admitted

    return check


def asks(cluster, *, prompt=LONG, max_tokens=4, **kw):
    """A request with fields of admission."""
    own = {k: kw.pop(k) for k in list(kw) if k in FIELDS}
    return dataclasses.replace(cluster.input(prompt, max_tokens, **kw), **own)


FIELDS = ("tenant", "priority", "targets", "weight", "limits", "slo_class")


def set_queues(cluster, tokens):
    for worker in cluster.workers.values():
        worker.set_load(queued_prefill_tokens=tokens)


async def queued(cluster, tokens):
    """Once the router has heard it."""
    set_queues(cluster, tokens)
    async with asyncio.timeout(3):
        while any(w.load.queued_prefill_tokens != tokens for w in cluster.core.pool.view().workers):
            await asyncio.sleep(0.005)


async def waiting(cluster, count):
    async with asyncio.timeout(3):
        while cluster.core.gate.num_waiting != count:
            await asyncio.sleep(0.005)


async def test_request_waits_for_room_and_goes_when_a_worker_reports_it(
    cluster, assert_nothing_left
):
    await queued(cluster, HOUR)
    task = asyncio.create_task(cluster.run(asks(cluster)))
    await waiting(cluster, 1)
    assert not cluster["p0"].submitted and not cluster["d0"].submitted
    set_queues(cluster, 0)
    cluster.assert_right(await asyncio.wait_for(task, 5), LONG, 4)
    await assert_nothing_left(cluster)
    text = await cluster.rendered(
        'baton_admissions_total{result="waited",slo_class="standard"} 1.0'
    )
    assert 'baton_admission_wait_seconds_count{slo_class="standard"} 1.0' in text


async def test_too_late_is_refused_before_any_work_and_admitted_when_told_to_come_back(
    cluster, assert_nothing_left
):
    await queued(cluster, 30_000)  # 1.5 s of the assumed speed
    with pytest.raises(Overloaded, match="first token is predicted") as refused:
        await cluster.run(asks(cluster, targets=STRICT, slo_class="interactive"))
    assert 0.5 < refused.value.retry_after_s < 3.0
    assert not cluster["p0"].submitted and not cluster["d0"].submitted
    set_queues(cluster, 0)
    await asyncio.sleep(refused.value.retry_after_s)
    outcome = await cluster.run(asks(cluster, targets=STRICT, slo_class="interactive"))
    cluster.assert_right(outcome, LONG, 4)
    await assert_nothing_left(cluster)
    text = await cluster.rendered('result="ttft",slo_class="interactive"} 1.0')
    assert 'baton_slo_requests_total{objective="ttft",result="met",slo_class="interactive"}' in text
    none = 'baton_requests_total{finish_reason="error",model="fake"} 0.0'
    assert none in text, "a refused request has not ended: it never began"


async def test_pace_that_no_worker_keeps_holds_nobody_up(cluster, assert_nothing_left):
    for worker in cluster.workers.values():
        worker.step_s = 0.03
    first = asyncio.create_task(cluster.run(asks(cluster, max_tokens=50)))
    async with asyncio.timeout(3):
        while not any(w.submitted for w in cluster.workers.values()):
            await asyncio.sleep(0.005)
    hasty = asks(cluster, targets=SloTargets(None, 1e-6))
    cluster.assert_right(await asyncio.wait_for(cluster.run(hasty), 5), LONG, 4)
    assert not first.done(), "it waited for all others to end"
    await first
    await assert_nothing_left(cluster)


async def test_waiting_request_is_refused_in_time_for_its_target(cluster, assert_nothing_left):
    await queued(cluster, 12_000)  # 0.6 s of the assumed speed: in time, but not to be added to
    waits = asyncio.create_task(cluster.run(asks(cluster, targets=SloTargets(0.9))))
    await waiting(cluster, 1)
    with pytest.raises(Overloaded, match=r"can no longer come within the 0\.9 s"):
        await asyncio.wait_for(waits, 2)
    await assert_nothing_left(cluster)
    text = await cluster.rendered("baton_admission_refusal_seconds_count")
    for since in ("arrival", "unreachable"):
        assert f'baton_admission_refusal_seconds_count{{since="{since}"}} 1.0' in text


@pytest.mark.parametrize("how", ["cancel", "deadline", "stop"])
async def test_leaving_the_queue_frees_the_place_at_once(cluster, assert_nothing_left, how):
    await queued(cluster, HOUR)
    deadline_s = 0.3 if how == "deadline" else 20.0
    task = asyncio.create_task(cluster.run(asks(cluster, deadline_s=deadline_s)))
    await waiting(cluster, 1)
    if how == "cancel":
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif how == "deadline":
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(task, 2)
    else:
        await cluster.core.dispatcher.stop()
        with pytest.raises(Unavailable, match="stopping"):
            await asyncio.wait_for(task, 2)
    await assert_nothing_left(cluster)
    assert not cluster["p0"].submitted and not cluster["d0"].submitted


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.003, 0.006, 0.01, 0.02])
async def test_cancel_in_the_moment_of_admission_leaks_nothing(
    cluster, assert_nothing_left, delay_s
):
    await queued(cluster, HOUR)
    tasks = [asyncio.create_task(cluster.run(asks(cluster, max_tokens=200))) for _ in range(6)]
    await waiting(cluster, 6)
    set_queues(cluster, 0)
    await asyncio.sleep(delay_s)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await assert_nothing_left(cluster)


async def test_full_queue_refuses_and_says_when_to_come_back(make_cluster, config):
    config = dataclasses.replace(config, admission=AdmissionConfig(max_queued_requests=2))
    cluster = await make_cluster(config=config)
    await queued(cluster, HOUR)
    tasks = [asyncio.create_task(cluster.run(asks(cluster, tenant="heavy"))) for _ in range(2)]
    await waiting(cluster, 2)
    with pytest.raises(Overloaded, match="queue is full") as refused:
        await cluster.run(asks(cluster, tenant="heavy"))
    assert refused.value.retry_after_s > 0
    light = asyncio.create_task(cluster.run(asks(cluster, tenant="light")))
    await waiting(cluster, 2)
    done, _ = await asyncio.wait(tasks, timeout=2, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(Overloaded, match="most of it is yours"):
        await done.pop()
    set_queues(cluster, 0)
    cluster.assert_right(await asyncio.wait_for(light, 5), LONG, 4)
    await asyncio.gather(*tasks, return_exceptions=True)
    await cluster.settled()


async def test_tenants_take_turns_and_priority_orders_within_one(
    make_cluster, config, assert_nothing_left
):
    config = dataclasses.replace(config, admission=AdmissionConfig(quantum_tokens=32))
    cluster = await make_cluster(config=config)
    await queued(cluster, HOUR)
    tasks = []
    for tenant, priority in [("a", 0), ("a", 0), ("a", -5), ("b", 0)]:
        prompt = [7 * len(tasks) + 1] * 100
        request = asks(cluster, prompt=prompt, max_tokens=1, tenant=tenant, priority=priority)
        tasks.append(asyncio.create_task(cluster.run(request)))
        await waiting(cluster, len(tasks))
    submitted = []
    real_start = cluster.core.gate._submit

    def start(flight, placement):
        submitted.append((flight.request.tenant, flight.request.priority))
        return real_start(flight, placement)

    cluster.core.gate._submit = start
    set_queues(cluster, 0)
    await asyncio.wait_for(asyncio.gather(*tasks), 5)
    assert submitted.index(("a", -5)) < submitted.index(("a", 0))
    assert submitted[-1] == ("a", 0), "b came last and goes before a has had all its turns"
    await assert_nothing_left(cluster)


async def test_replay_after_a_failure_does_not_queue_again(make_cluster, assert_nothing_left):
    cluster = await make_cluster(1, 2)
    cluster["d0"].faults.kill_at = cluster["d1"].faults.kill_at = 4
    shared = cluster["d0"].faults
    cluster["d1"].faults = shared
    shared.kills_left = 1
    task = asyncio.create_task(cluster.run(asks(cluster, max_tokens=12)))
    async with asyncio.timeout(3):
        while all(w.is_alive for w in cluster.workers.values()):
            await asyncio.sleep(0.002)
    for worker in cluster.workers.values():
        if worker.is_alive:
            worker.set_load(queued_prefill_tokens=HOUR)
    cluster.assert_right(await asyncio.wait_for(task, 8), LONG, 12)
    await assert_nothing_left(cluster)
    text = await cluster.rendered("baton_admissions_total")
    assert 'result="at_once",slo_class="standard"} 1.0' in text
    assert 'baton_admissions_total{result="waited",slo_class="standard"} 0.0' in text


async def test_worker_that_comes_wakes_those_who_wait(make_cluster, assert_nothing_left):
    cluster = await make_cluster(1, 1)
    await cluster["p0"].kill()
    await cluster["d0"].kill()
    async with asyncio.timeout(3):
        while any(not w.is_quarantined for w in cluster.core.pool.view().workers):
            await asyncio.sleep(0.01)
    tasks = [asyncio.create_task(cluster.run(asks(cluster))) for _ in range(5)]
    await waiting(cluster, 5)
    await cluster["d0"].revive()
    for outcome in await asyncio.wait_for(asyncio.gather(*tasks), 8):
        cluster.assert_right(outcome, LONG, 4)
    await assert_nothing_left(cluster)


async def test_no_worker_keeps_its_own_error(make_cluster, assert_nothing_left):
    cluster = await make_cluster(0, 0)
    tasks = [asyncio.create_task(cluster.run(asks(cluster, tenant=t))) for t in ("a", "b", "b")]
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert all(isinstance(r, NoWorker) for r in results)
    await assert_nothing_left(cluster)


async def test_quota_is_held_while_it_runs_and_settled_by_what_was_used(cluster):
    limits = QuotaLimits(tokens_per_minute=1000, max_concurrent=1)
    request = asks(cluster, max_tokens=8, tenant="t", limits=limits)
    running = asyncio.create_task(cluster.run(request))
    async with asyncio.timeout(3):
        while not cluster.core.dispatcher.flights or not any(
            f.attempt for f in cluster.core.dispatcher.flights
        ):
            await asyncio.sleep(0.001)
    with pytest.raises(QuotaExceeded, match="1 requests at a time"):
        await cluster.run(asks(cluster, tenant="t", limits=limits))
    await running
    # 108 used, and not the 356 that were taken at first.
    await cluster.run(asks(cluster, max_tokens=8, tenant="t", limits=limits))
    answer = await cluster.core.shared.take_quota("t", limits=limits, num_tokens=1)
    assert answer.remaining_tokens == pytest.approx(1000 - 216 - 1, abs=30)
    cluster.core.shared.return_quota(answer.grant)


async def test_quota_is_given_back_by_one_who_never_ran(cluster, assert_nothing_left):
    await queued(cluster, HOUR)
    limits = QuotaLimits(tokens_per_minute=1000, max_concurrent=1)
    for _ in range(3):
        task = asyncio.create_task(cluster.run(asks(cluster, tenant="t", limits=limits)))
        await waiting(cluster, 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    answer = await cluster.core.shared.take_quota("t", limits=limits, num_tokens=1000)
    assert answer.is_granted
    await assert_nothing_left(cluster)


async def test_refusal_by_quota_tells_where_the_tenant_stands(cluster):
    limits = QuotaLimits(requests_per_minute=1, tokens_per_minute=10_000)
    await cluster.run(asks(cluster, tenant="t", limits=limits))
    with pytest.raises(QuotaExceeded) as refused:
        await cluster.run(asks(cluster, tenant="t", limits=limits))
    assert 50 < refused.value.retry_after_s <= 60
    rates = {rate.name: rate for rate in refused.value.rate_limits}
    assert (rates["requests"].limit, rates["requests"].remaining) == (1, 0)
    assert 9_500 < rates["tokens"].remaining < 10_000
    assert rates["requests"].reset_s == pytest.approx(60, abs=2)


async def test_five_hundred_requests_of_all_kinds_end_and_leave_nothing(
    make_cluster, assert_nothing_left
):
    cluster = await make_cluster(2, 2)
    kinds = [
        {"tenant": "a"},
        {"tenant": "b", "priority": 3},
        {"tenant": "c", "weight": 3.0, "targets": SloTargets(5.0, 1.0)},
        {"tenant": "d", "targets": SloTargets(0.02)},
    ]
    requests = [asks(cluster, max_tokens=1 + i % 9, **kinds[i % 4]) for i in range(500)]
    tasks = [asyncio.create_task(cluster.run(r)) for r in requests]
    for step in range(20):
        set_queues(cluster, HOUR if step % 2 else 0)
        await asyncio.sleep(0.02)
        tasks[step * 7].cancel()
    set_queues(cluster, 0)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    wrong = [
        r
        for r in results
        if isinstance(r, BaseException)
        and not isinstance(r, (Overloaded, asyncio.CancelledError, RequestCancelled))
    ]
    assert not wrong
    done = [r for r in results if not isinstance(r, BaseException)]
    assert len(done) >= 250
    await assert_nothing_left(cluster)


async def test_request_that_cannot_be_looked_at_does_not_hold_up_the_others(
    cluster, assert_nothing_left
):
    await queued(cluster, HOUR)
    poison = asks(cluster)
    tasks = [asyncio.create_task(cluster.run(poison))]
    await waiting(cluster, 1)
    tasks += [asyncio.create_task(cluster.run(asks(cluster))) for _ in range(3)]
    await waiting(cluster, 4)
    real_choose = cluster.core.gate._choose

    def choose(flight):
        if flight.request is poison:
            raise RuntimeError("scripted")
        return real_choose(flight)

    cluster.core.gate._choose = choose
    set_queues(cluster, 0)
    first, *others = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert isinstance(first, RuntimeError)
    for outcome in others:
        cluster.assert_right(outcome, LONG, 4)
    await assert_nothing_left(cluster)


async def test_those_refused_in_the_look_that_breaks_off_hear_of_it(cluster, assert_nothing_left):
    await queued(cluster, HOUR)
    tasks = [asyncio.create_task(cluster.run(asks(cluster))) for _ in range(2)]
    await waiting(cluster, 2)
    gate = cluster.core.gate

    def pump(now_s, prospect_of, launch, *, news_at_s=None):
        lane = next(iter(gate._lanes.values()))
        first, second = list(lane.queue)
        gate._asked = second
        lane._give_up(first, Refusal.LATE, 0.0, now_s, now_s)
        lane.pump = lambda *_, **__: Pumped([], has_more=False)
        raise RuntimeError("scripted")

    next(iter(gate._lanes.values())).pump = pump
    gate.poke()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert {type(r) for r in results} == {Overloaded, RuntimeError}
    await assert_nothing_left(cluster)


async def test_submit_that_fails_for_another_reason_is_the_requests_own_error(
    cluster, assert_nothing_left
):
    await queued(cluster, HOUR)
    tasks = [asyncio.create_task(cluster.run(asks(cluster))) for _ in range(2)]
    await waiting(cluster, 2)
    real_submit, num_failures = cluster.core.gate._submit, iter([True])

    def submit(flight, placement):
        if next(num_failures, False):
            raise ValueError("scripted")
        return real_submit(flight, placement)

    cluster.core.gate._submit = submit
    set_queues(cluster, 0)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert sum(isinstance(r, ValueError) for r in results) == 1
    await assert_nothing_left(cluster)


async def test_worker_lost_between_choice_and_submit_leaves_the_rest_to_the_dispatcher(
    cluster, assert_nothing_left
):
    real_submit, num_losses = cluster.core.gate._submit, iter([True])

    def submit(flight, placement):
        if next(num_losses, False):
            raise WorkerLost("scripted")
        return real_submit(flight, placement)

    cluster.core.gate._submit = submit
    cluster.assert_right(await cluster.generate(LONG, 4), LONG, 4)
    await assert_nothing_left(cluster)


async def test_lost_wake_up_delays_a_request_but_does_not_keep_it(cluster, assert_nothing_left):
    await queued(cluster, HOUR)
    task = asyncio.create_task(cluster.run(asks(cluster)))
    await waiting(cluster, 1)
    cluster.core.pool._subscribers.clear()
    set_queues(cluster, 0)
    cluster.assert_right(await asyncio.wait_for(task, 3), LONG, 4)
    await assert_nothing_left(cluster)
