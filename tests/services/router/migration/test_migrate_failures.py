"""Moves of running requests that go wrong: in each case the client gets all tokens, once, and
nothing is left on either worker."""

from __future__ import annotations

import asyncio

import pytest

from baton.core.errors import BatonError
from baton.core.request import FinishReason, Work
from migrating import clean, done, outcomes, running, until, with_steps, works

LONG = list(range(1, 101))
PHASES = ("reading", "frozen")
"""Of a takeover before the old worker has let go."""


@pytest.fixture
async def two(make_cluster):
    """One prefill worker, two decode workers with slow steps."""
    return await with_steps(await make_cluster(1, 2), 0.01)


@pytest.mark.parametrize("phase", PHASES)
async def test_failed_takeover_leaves_the_request_where_it_is(two, phase, caplog):
    task, d1, d2 = await running(two, LONG, max_tokens=40)
    d2.faults.takeover_fails_in = phase
    d1.set_load(is_draining=True)
    two.assert_right(await done(task), LONG, 40)
    assert works(d1) == [Work.DECODE], "the old worker has gone on"
    assert set(works(d2)) == {Work.TAKEOVER}
    await until(lambda: outcomes(two)["drain", "failed"] >= 1)
    assert "scripted" in caplog.text
    await clean(two)


async def test_failed_takeovers_are_spaced_out(two):
    task, d1, d2 = await running(two, LONG, max_tokens=100)
    d2.faults.takeover_fails_in = "reading"
    d1.set_load(is_draining=True)
    two.assert_right(await done(task), LONG, 100)
    # Pauses of 0.1, 0.2, 0.4, 0.4 s within little more than a second.
    assert 2 <= len(d2.submitted) <= 6


async def test_refused_takeover_is_tried_again_later(two):
    task, d1, d2 = await running(two, LONG, max_tokens=150)
    d2.faults.is_full = True
    d1.set_load(is_draining=True)
    await until(lambda: d2.submitted)
    d2.faults.is_full = False
    two.assert_right(await done(task), LONG, 150)
    found = outcomes(two)
    assert found["drain", "moved"] == 1 and found["drain", "failed"] >= 1
    await clean(two)


async def test_takeover_that_takes_too_long_is_taken_back(two):
    task, d1, d2 = await running(two, LONG, max_tokens=260)
    d2.faults.takeover_stays_in = "frozen"
    d1.set_load(is_draining=True)
    await until(lambda: d2.live)
    two.assert_right(await done(task), LONG, 260)
    assert d2.cancelled == [d2.submitted[0].request_id]
    # Its old messages could be taken for new ones, so this process is not asked again.
    assert works(d2) == [Work.TAKEOVER] and works(d1) == [Work.DECODE]
    await until(lambda: outcomes(two) == {("drain", "failed"): 1.0})
    await clean(two)


@pytest.mark.parametrize("phase", PHASES)
async def test_new_worker_lost_before_the_move(two, phase):
    task, d1, d2 = await running(two, LONG, max_tokens=60)
    d2.faults.takeover_stays_in = phase
    d1.set_load(is_draining=True)
    await until(lambda: any(v.phase == phase for v in d2.live.values()))
    await d2.kill()
    two.assert_right(await done(task), LONG, 60)
    assert works(d1) == [Work.DECODE]
    await until(lambda: outcomes(two)["drain", "failed"] == 1)
    await clean(two)


@pytest.mark.parametrize("phase", PHASES)
async def test_old_worker_lost_before_the_move_is_a_replay(two, phase):
    task, d1, d2 = await running(two, LONG, max_tokens=60)
    d2.faults.takeover_stays_in = phase
    d1.set_load(is_draining=True)
    await until(lambda: any(v.phase == phase for v in d2.live.values()))
    wire_id = d2.submitted[0].request_id
    await d1.kill()
    d2.faults.takeover_stays_in = ""
    two.assert_right(await done(task), LONG, 60)
    replay = d2.submitted[-1]
    assert replay.work is not Work.TAKEOVER and replay.request_id != wire_id
    assert outcomes(two).keys() <= {("drain", "void"), ("drain", "failed")}
    await clean(two)


@pytest.mark.parametrize("first_heard", ["old", "new"])
async def test_request_that_neither_worker_has_any_more_is_a_replay(two, first_heard):
    """The old one has handed it on, the new one lost it: whichever of the two is heard first."""
    task, d1, d2 = await running(two, LONG, max_tokens=60)
    d2.faults.takeover_fails_in = "handed on"
    (d2 if first_heard == "old" else d1).faults.write_delay_s = 0.2
    d1.set_load(is_draining=True)
    await until(lambda: d2.submitted)
    wire_id = d2.submitted[0].request_id
    await until(lambda: any(not w.live for w in (d1, d2)) and not d2.live)
    d1.faults.write_delay_s = d2.faults.write_delay_s = 0.0
    two.assert_right(await done(task), LONG, 60)
    replays = [r for w in two.workers.values() for r in w.submitted if r.request_id != wire_id]
    assert [r for r in replays if r.output_token_ids], "computed on with the tokens so far"
    assert ("drain", "moved") not in outcomes(two)
    await clean(two)


async def test_old_worker_lost_after_the_move_is_not_noticed(two):
    task, d1, d2 = await running(two, LONG, max_tokens=80)
    d1.set_load(is_draining=True)
    await until(lambda: any(v.has_spoken for v in d2.live.values()))
    await until(lambda: not two.core.migrator.num_under_way)
    await asyncio.sleep(0.05)
    await d1.kill()
    two.assert_right(await done(task), LONG, 80)
    assert works(d2) == [Work.TAKEOVER]


async def test_old_worker_lost_with_tokens_on_the_way_is_a_replay(two):
    task, d1, d2 = await running(two, LONG, max_tokens=80)
    d2.faults.takeover_stays_in = "reading"
    d1.set_load(is_draining=True)
    await until(lambda: d2.live)
    # What it sends from now on, before it lets go, never arrives.
    d1.faults.is_frozen = True
    await asyncio.sleep(0.05)
    d2.faults.takeover_stays_in = ""
    await until(lambda: any(v.has_spoken for v in d2.live.values()))
    await d1.kill()
    two.assert_right(await done(task), LONG, 80)
    await clean(two)


async def test_new_worker_lost_after_the_move_is_a_replay(two):
    task, d1, d2 = await running(two, LONG, max_tokens=80)
    d1.set_load(is_draining=True)
    await until(lambda: any(v.has_spoken for v in d2.live.values()))
    d1.set_load(is_draining=False)
    await until(lambda: len(two.core.pool.view().eligible(model="fake")) == 3)
    await d2.kill()
    two.assert_right(await done(task), LONG, 80)
    (replay,) = d1.submitted[1:]
    assert replay.work is not Work.TAKEOVER and replay.output_token_ids
    await clean(two)


@pytest.mark.parametrize("phase", PHASES)
async def test_request_that_ends_on_its_old_worker_calls_the_move_off(two, phase):
    task, d1, d2 = await running(two, LONG, max_tokens=1000)
    d2.faults.takeover_stays_in = phase
    d1.set_load(is_draining=True)
    await until(lambda: any(v.phase == phase for v in d2.live.values()))
    (live,) = d1.live.values()
    d1.eos_at = live.index
    live.is_frozen = False
    outcome = await done(task)
    assert outcome.finish_reason is FinishReason.STOP
    await clean(two)
    assert works(d2) == [Work.TAKEOVER]
    await until(lambda: outcomes(two) == {("drain", "void"): 1.0})


@pytest.mark.parametrize("phase", [*PHASES, "moved"])
async def test_cancel_reaches_both_workers(two, phase):
    task, d1, d2 = await running(two, LONG, max_tokens=1000)
    d2.faults.takeover_stays_in = phase
    d1.set_load(is_draining=True)
    if phase == "moved":
        await until(lambda: any(v.has_spoken for v in d2.live.values()))
        await asyncio.sleep(0.05)
    else:
        await until(lambda: any(v.phase == phase for v in d2.live.values()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await clean(two)
    wire_id = d2.submitted[0].request_id
    assert d2.cancelled == [wire_id]
    assert d1.cancelled == ([] if phase == "moved" else [wire_id])


async def test_standing_still_for_a_move_is_no_stall(two):
    # The old worker's only request stands still longer than the watchdog allows.
    task, d1, d2 = await running(two, LONG, max_tokens=30)
    d2.faults.takeover_stays_in = "frozen"
    d1.set_load(is_draining=True)
    await until(lambda: any(v.phase == "frozen" for v in d2.live.values()))
    await asyncio.sleep(0.8)
    assert not any(w.is_quarantined for w in two.core.pool.view().workers)
    assert (await two.core.dispatcher.health()).is_ready
    d2.faults.takeover_stays_in = ""
    two.assert_right(await done(task), LONG, 30)
    assert outcomes(two) == {("drain", "moved"): 1.0}


async def test_router_that_stops_ends_a_moving_request(two):
    task, d1, d2 = await running(two, LONG, max_tokens=1000)
    d2.faults.takeover_stays_in = "frozen"
    d1.set_load(is_draining=True)
    await until(lambda: d2.live)
    async with asyncio.timeout(4):
        await two.core.stop()
    with pytest.raises(BatonError, match="stopping"):
        await task
    assert not two.core.migrator.num_under_way
