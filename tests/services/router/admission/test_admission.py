"""The admission state machine: single decisions, and a random walk over all of them."""

from __future__ import annotations

import random

import pytest

from baton.core.worker_info import WorkerId
from services.router.admission.admission import MAX_PASSED_S, Lane
from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.slo import NO_TARGETS, SloTargets
from services.router.admission.ticket import Prospect, Refusal, Ticket, TicketState
from services.router.placement.placement import Prediction

IDLE = Prediction(0.1, 0.01)
BUSY = Prediction(0.8, 0.01, 0.7)
"""Within a second, but behind more than may be ahead."""


def lane_of(**kw: object) -> Lane:
    return Lane(AdmissionConfig(**kw), max_ahead_s=0.5, worker_wait_s=2.0)  # type: ignore[arg-type]


def ticket_of(tenant: str = "a", ttft_s: float | None = None, at_s: float = 0.0, **kw) -> Ticket:
    values = {"num_prompt_tokens": 1000, "num_output_tokens": 4096, **kw}
    return Ticket(tenant, 1.0, targets=SloTargets(ttft_s), arrived_at_s=at_s, **values)


def prospect(predicted: Prediction | None = IDLE, num_uncached: int = 1000) -> Prospect:
    return Prospect(predicted, num_uncached)


def arrive(lane: Lane, ticket: Ticket, predicted: Prediction | None = IDLE, now_s: float = 0.0):
    return lane.arrive(ticket, prospect(predicted), now_s)


class Launched(list):
    """Tickets in the order in which they went."""

    def __call__(self, ticket: Ticket) -> None:
        self.append(ticket)


def pump(lane: Lane, now_s: float = 0.0, predicted: Prediction | None = IDLE) -> Launched:
    launched = Launched()
    lane.pump(now_s, lambda ticket: prospect(predicted), launched)
    return launched


def test_goes_at_once_where_nobody_waits():
    lane, ticket = lane_of(), ticket_of()
    assert arrive(lane, ticket) == []
    assert ticket.state is TicketState.ADMITTED and lane.num_admitted == 1
    lane.end(ticket, num_uncached_tokens=1000, num_output_tokens=10)
    assert lane.num_admitted == 0
    lane.check_integrity()


def test_goes_at_once_where_nothing_is_predicted():
    lane, ticket = lane_of(), ticket_of(ttft_s=1e-6)
    arrive(lane, ticket, None)
    assert ticket.state is TicketState.ADMITTED


def test_waits_while_too_much_is_ahead_and_goes_when_it_has_shrunk():
    lane, ticket = lane_of(), ticket_of()
    arrive(lane, ticket, BUSY)
    assert ticket.state is TicketState.WAITING
    assert not pump(lane, 0.1, BUSY)
    assert pump(lane, 0.2) == [ticket]
    assert ticket.state is TicketState.ADMITTED and ticket.wait_started_at_s == 0.0


def test_newcomer_does_not_pass_those_who_wait():
    lane, first, second = lane_of(), ticket_of(), ticket_of()
    arrive(lane, first, BUSY)
    arrive(lane, second, IDLE)
    assert second.state is TicketState.WAITING
    assert pump(lane) == [first, second]


def test_class_without_targets_waits_as_long_as_it_may():
    lane, ticket = lane_of(), ticket_of()
    arrive(lane, ticket, BUSY)
    assert lane.next_check_at_s is None
    assert lane.expire(1e6) == [] and ticket.state is TicketState.WAITING


def test_predicted_too_late_is_refused_on_arrival_with_the_time_it_takes():
    lane, ticket = lane_of(), ticket_of(ttft_s=1.0)
    assert arrive(lane, ticket, Prediction(1.5, 0.01, 1.4)) == [ticket]
    assert (ticket.state, ticket.refusal) == (TicketState.REFUSED, Refusal.TTFT)
    assert ticket.retry_after_s == pytest.approx(0.5)
    assert not lane.queue and not lane.num_admitted


def test_those_refused_together_are_not_told_to_come_back_together():
    lane = lane_of()
    tickets = [ticket_of(ttft_s=1.0) for _ in range(10)]
    for ticket in tickets:
        arrive(lane, ticket, Prediction(1.5, 0.01, 1.4))
    told_s = [ticket.retry_after_s for ticket in tickets]
    assert told_s == sorted(told_s) and told_s[-1] > told_s[0] + 0.5
    assert len(set(told_s)) == 10


def test_nobody_is_sent_away_for_longer_than_allowed():
    lane = lane_of(max_retry_after_s=3.0)
    tickets = [ticket_of(ttft_s=1.0) for _ in range(200)]
    for ticket in tickets:
        arrive(lane, ticket, Prediction(500.0, 0.01, 400.0))
    assert max(ticket.retry_after_s for ticket in tickets) == 3.0


def test_waiting_request_is_refused_as_soon_as_it_can_no_longer_be_in_time():
    lane, ticket = lane_of(), ticket_of(ttft_s=1.2)
    arrive(lane, ticket, BUSY)
    # A tenth of a second is its own work.
    assert lane.next_check_at_s == pytest.approx(1.1)
    assert lane.expire(1.09) == []
    assert lane.expire(1.11) == [ticket]
    assert ticket.refusal is Refusal.LATE and ticket.retry_after_s > 0
    assert not lane.queue and lane.next_check_at_s is None


def test_request_whose_turn_comes_too_late_is_refused_at_its_turn():
    lane, ticket = lane_of(), ticket_of(ttft_s=1.2)
    arrive(lane, ticket, BUSY)
    pumped = lane.pump(0.5, lambda t: prospect(BUSY), lambda t: None)
    assert pumped.refused == [ticket] and ticket.refusal is Refusal.LATE


def test_full_queue_refuses_the_newcomer_or_pushes_out_the_heavy_tenant():
    lane = lane_of(max_queued_requests=4)
    heavy = [ticket_of("heavy") for _ in range(4)]
    for ticket in heavy:
        arrive(lane, ticket, BUSY)
    more = ticket_of("heavy")
    assert arrive(lane, more, BUSY) == [more] and more.refusal is Refusal.QUEUE_FULL
    light = ticket_of("light")
    assert arrive(lane, light, BUSY) == [heavy[-1]]
    assert heavy[-1].refusal is Refusal.PUSHED_OUT and heavy[-1].state is TicketState.REFUSED
    assert light.state is TicketState.WAITING
    assert more.retry_after_s > 0 and heavy[-1].retry_after_s > 0
    lane.check_integrity()


def test_without_a_worker_it_waits_for_one_and_no_longer():
    lane, ticket = lane_of(), ticket_of(ttft_s=1.0)
    assert lane.arrive(ticket, None, 0.0) == []
    assert lane.next_check_at_s == 2.0
    assert pump(lane, 1.0) == [ticket]
    other = ticket_of()
    lane.arrive(other, None, 10.0)
    assert lane.expire(11.9) == []
    assert lane.expire(12.0) == [other] and other.refusal is Refusal.NO_WORKER
    assert not lane.is_shedding(12.0), "the load is not to blame"


def test_worker_lost_while_waiting_is_waited_for_anew():
    lane, ticket = lane_of(), ticket_of()
    arrive(lane, ticket, BUSY)
    lane.pump(50.0, lambda t: None, lambda t: None)
    assert lane.next_check_at_s == 52.0
    assert not pump(lane, 51.0, BUSY)
    assert lane.next_check_at_s is None and lane.expire(60.0) == []


def test_request_without_a_worker_does_not_hold_up_other_tenants():
    lane = lane_of()
    too_long, other = ticket_of("a"), ticket_of("b")
    lane.arrive(too_long, None, 0.0)
    arrive(lane, other, BUSY)
    launched = Launched()
    lane.pump(0.0, lambda t: None if t is too_long else prospect(IDLE), launched)
    assert launched == [other]


def test_one_that_cannot_go_is_passed_by_others_for_a_while_only():
    lane = lane_of()
    no_room = Prediction(0.1, 0.01, 0.0, needs_room=True)
    large = ticket_of("large")
    arrive(lane, large, no_room)

    def prospect_of(ticket: Ticket) -> Prospect:
        return prospect(no_room if ticket is large else IDLE)

    passed = []
    for step in range(20):
        small = ticket_of("small")
        arrive(lane, small)
        lane.pump(0.1 * step, prospect_of, passed.append)
    assert 0 < len(passed) <= 10 * MAX_PASSED_S + 2
    assert pump(lane, 3.0)[0] is large


def test_leaving_the_queue_frees_the_place_at_once():
    lane = lane_of(max_queued_requests=1)
    first, second = ticket_of(), ticket_of()
    arrive(lane, first, BUSY)
    lane.leave(first, 0.1)
    assert first.state is TicketState.LEFT and not lane.queue
    assert arrive(lane, second, BUSY) == []
    lane.check_integrity()


def test_output_that_is_expected_follows_what_came():
    lane = lane_of()
    costs = []
    for _ in range(300):
        ticket = ticket_of()
        arrive(lane, ticket)
        costs.append(ticket.cost_tokens)
        lane.end(ticket, num_uncached_tokens=1000, num_output_tokens=16)
        lane.learn(ticket, ttft_s=0.1, mean_itl_s=0.01, num_output_tokens=16)
    assert costs[-1] < 1060 < 1500 < costs[0]
    short = ticket_of(num_output_tokens=1)
    arrive(lane, short)
    assert short.cost_tokens < costs[-1]


def test_cached_prefix_costs_its_tenant_nothing():
    lane = lane_of()
    cached, cold = ticket_of(num_output_tokens=1), ticket_of(num_output_tokens=1)
    lane.arrive(cached, prospect(IDLE, num_uncached=16), 0.0)
    lane.arrive(cold, prospect(IDLE, num_uncached=1000), 0.0)
    assert cached.cost_tokens == pytest.approx(18, abs=0.5)
    assert cold.cost_tokens == pytest.approx(1002, abs=0.5)


def test_long_context_costs_more_for_each_token_generated():
    lane = lane_of(residency_tokens=1000)
    assert lane.cost.tokens(0, 0, 100) == pytest.approx(2 * 100 * 1.05)
    assert lane.cost.tokens(0, 2000, 100) == pytest.approx(2 * 100 * 3.05)


def full(places_per_s: float, num_over: int = 1) -> Prospect:
    """The decode batches are as slow as they may be."""
    itl_s = 0.05 + 0.001 * (num_over - 0.5)
    return Prospect(
        Prediction(0.1, itl_s),
        1000,
        decode=WorkerId("d"),
        itl_relief_s=0.001,
        places_per_s=places_per_s,
        num_decoding=2,
    )


def lane_with_full_batch() -> tuple[Lane, SloTargets]:
    lane, targets = lane_of(), SloTargets(1.0, 0.05)
    running = ticket_of()
    running.targets = targets
    lane.arrive(running, full(9.0, num_over=0), 0.0)
    assert running.state is TicketState.ADMITTED
    return lane, targets


@pytest.mark.parametrize(
    ("places_per_s", "num_over", "state"),
    [
        (9.0, 1, TicketState.WAITING),
        (1.0, 1, TicketState.REFUSED),  # A mean of a second is no promise for one within a second.
        (9.0, 5, TicketState.REFUSED),
        (0.0, 1, TicketState.WAITING),  # Others' sequences: nothing is known.
    ],
)
def test_waits_for_a_place_only_where_one_comes_in_time_as_good_as_certainly(
    places_per_s, num_over, state
):
    lane, targets = lane_with_full_batch()
    ticket = ticket_of()
    ticket.targets = targets
    lane.arrive(ticket, full(places_per_s, num_over), 0.0)
    assert ticket.state is state
    assert ticket.refusal is (Refusal.ITL if state is TicketState.REFUSED else None)


def test_queue_is_judged_anew_when_places_come_free_more_slowly_than_expected():
    lane, targets = lane_with_full_batch()
    waiting = [ticket_of() for _ in range(20)]
    for ticket in waiting:
        ticket.targets = targets
        lane.arrive(ticket, full(100.0), 0.0)
        assert ticket.state is TicketState.WAITING
    still = lane.pump(0.01, lambda t: full(100.0), lambda t: None)
    assert not still.refused
    pumped = lane.pump(0.02, lambda t: full(10.0), lambda t: None, news_at_s=0.015)
    # A few can hope on; the others are told now, and not at the end of their second.
    assert 8 <= len(pumped.refused) <= 14
    assert all(t.refusal is Refusal.ITL and t.retry_after_s > 0 for t in pumped.refused)
    assert {t.unreachable_at_s for t in pumped.refused} == {0.015}
    assert {t.state for t in waiting[:5]} == {TicketState.WAITING}
    lane.check_integrity()


def test_queue_is_judged_anew_when_prompts_leave_more_slowly_than_expected():
    lane = lane_of()
    slow = Prediction(1.7, 0.01, 0.7)
    fast = Prediction(0.71, 0.01, 0.7)
    waiting = [ticket_of(ttft_s=3.0) for _ in range(20)]
    for ticket in waiting:
        arrive(lane, ticket, fast)
        assert ticket.state is TicketState.WAITING
    assert not lane.pump(0.01, lambda t: prospect(fast), lambda t: None).refused
    refused = lane.pump(0.02, lambda t: prospect(slow), lambda t: None).refused
    assert refused and all(t.refusal is Refusal.LATE for t in refused)
    assert waiting[0].state is TicketState.WAITING


def test_requests_without_a_target_are_never_given_up():
    lane, _ = lane_with_full_batch()
    patient = [ticket_of() for _ in range(50)]
    for ticket in patient:
        lane.arrive(ticket, full(1.0), 0.0)
    assert not lane.pump(5.0, lambda t: full(0.1), lambda t: None).refused
    assert {t.state for t in patient} == {TicketState.WAITING}


@pytest.mark.parametrize("seed", range(3))
def test_random_walk(seed):
    rng = random.Random(seed)
    lane = lane_of(max_queued_requests=40, max_queued_tokens=60_000, max_tenant_requests=20)
    now_s, ahead_s, has_worker = 0.0, 0.0, True
    known: dict[Ticket, TicketState] = {}
    running: list[Ticket] = []

    def predicted() -> Prediction:
        itl_s = 0.001 * len(running) * rng.uniform(0.5, 2)
        return Prediction(ahead_s + 0.1, itl_s, ahead_s, rng.random() < 0.05)

    def prospect_of(ticket: Ticket) -> Prospect | None:
        if not has_worker:
            return None
        return Prospect(
            predicted() if rng.random() < 0.97 else None,
            rng.randrange(1, 1000),
            2,
            decode=WorkerId(f"d{rng.randrange(3)}"),
            itl_relief_s=0.001,
            places_per_s=rng.choice([0.0, 1.0, 50.0]),
        )

    def launch(ticket: Ticket) -> None:
        nonlocal ahead_s
        assert ticket.state is TicketState.ADMITTED and ticket not in running
        running.append(ticket)
        ahead_s += 0.05

    def refused(tickets: list[Ticket]) -> None:
        for ticket in tickets:
            assert ticket.state is TicketState.REFUSED and ticket.refusal is not None
            assert known.pop(ticket) in (TicketState.NEW, TicketState.WAITING), "left twice"
            if ticket.refusal is not Refusal.NO_WORKER:
                assert 0.1 <= ticket.retry_after_s <= 60.0

    for _ in range(12_000):
        now_s += rng.expovariate(50)
        ahead_s = max(0.0, ahead_s - 0.02)
        action = rng.random()
        if action < 0.5:
            targets = rng.choice([NO_TARGETS, SloTargets(1.0), SloTargets(0.5, 0.03)])
            ticket = Ticket(
                f"t{rng.randrange(5)}", 1.0, priority=rng.randrange(3), targets=targets,
                due_at_s=now_s + (targets.ttft_s or 600), weight=rng.choice([1.0, 2.0]),
                arrived_at_s=now_s, num_prompt_tokens=rng.randrange(1, 2000),
                num_output_tokens=rng.randrange(1, 500),
            )  # fmt: skip
            known[ticket] = TicketState.NEW
            refused(lane.arrive(ticket, prospect_of(ticket), now_s))
            if ticket.state is TicketState.ADMITTED:
                launch(ticket)
            if ticket in known:
                known[ticket] = ticket.state
        elif action < 0.7:
            refused(lane.pump(now_s, prospect_of, launch).refused)
        elif action < 0.8:
            refused(lane.expire(now_s))
            assert lane.next_check_at_s is None or lane.next_check_at_s > now_s
        elif action < 0.85 and known:
            ticket = rng.choice(list(known))
            if ticket.state is TicketState.WAITING:
                lane.leave(ticket, now_s)
                del known[ticket]
        elif action < 0.99 and running:
            ticket = running.pop(rng.randrange(len(running)))
            lane.end(ticket, num_uncached_tokens=rng.randrange(2000), num_output_tokens=50)
            lane.learn(ticket, ttft_s=rng.random(), mean_itl_s=rng.random() / 10,
                       num_output_tokens=50)  # fmt: skip
            known.pop(ticket, None)
        elif action >= 0.99:
            has_worker = not has_worker
        waiting = {t for t in known if t.state is TicketState.WAITING}
        assert waiting == set(lane.queue)
        assert lane.num_admitted == len(running)
        lane.check_integrity()
    for ticket in list(lane.queue):
        lane.leave(ticket, now_s)
    for ticket in running:
        lane.end(ticket, num_uncached_tokens=1, num_output_tokens=1)
    assert not lane.queue and not lane.num_admitted and lane.next_check_at_s is None
    lane.check_integrity()
