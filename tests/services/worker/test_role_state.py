"""The states of a change of role: seeded random walks beside the single laws."""

from __future__ import annotations

import random

import pytest

from baton.core.errors import (
    DeadlineExceeded,
    RoleChangeOvertaken,
    RoleChangeRefused,
    Unavailable,
)
from baton.core.worker_info import Role
from services.worker.role_state import Asked, RoleMachine, RoleState

P, D = Role.PREFILL, Role.DECODE


def leaving(deadline_s: float = 10.0) -> RoleMachine:
    machine = RoleMachine(D)
    assert machine.ask(P, deadline_s=deadline_s) is Asked.STARTED
    machine.leave()
    return machine


def test_the_role_it_has_is_no_change() -> None:
    machine = RoleMachine(D)
    assert machine.ask(D, deadline_s=1) is Asked.HAS_IT
    assert (machine.state, machine.version) == (RoleState.SERVING, 1)


def test_it_works_while_it_is_asked_and_not_while_it_leaves() -> None:
    machine = RoleMachine(D)
    machine.ask(P, deadline_s=10)
    assert machine.takes_work and machine.role is D
    machine.leave()
    assert not machine.takes_work and machine.role is D


def test_the_role_changes_once_no_request_is_left() -> None:
    machine = leaving()
    assert machine.look(1.0, num_live=3) is None
    outcome = machine.look(2.0, num_live=0)
    assert outcome is not None and outcome.error is None
    assert (machine.role, machine.version, machine.takes_work) == (P, 2, True)
    assert machine.look(3.0, num_live=0) is None


def test_a_late_change_leaves_everything_as_it_was() -> None:
    machine = leaving(deadline_s=10.0)
    outcome = machine.look(10.0, num_live=2)
    assert outcome is not None and isinstance(outcome.error, DeadlineExceeded)
    assert "2 requests" in str(outcome.error)
    assert (machine.role, machine.version, machine.takes_work) == (D, 1, True)
    assert machine.ask(P, deadline_s=20) is Asked.STARTED


def test_the_same_wish_joins_the_change_under_way_and_another_is_refused() -> None:
    machine = leaving()
    assert machine.ask(P, deadline_s=99) is Asked.JOINED
    with pytest.raises(RoleChangeRefused, match="becoming a prefill worker"):
        machine.ask(D, deadline_s=99)


def test_work_for_an_earlier_role_is_told_apart() -> None:
    machine = leaving()
    machine.look(1.0, num_live=0)
    assert [machine.is_current(version) for version in (0, 1, 2, 3)] == [True, False, True, False]


def test_leaving_for_good_overtakes_a_change() -> None:
    machine = leaving()
    machine.end()
    machine.end()
    outcome = machine.take_overtaken()
    assert outcome is not None and isinstance(outcome.error, RoleChangeOvertaken)
    assert machine.take_overtaken() is None
    assert (machine.state, machine.role) == (RoleState.ENDING, D)
    assert machine.look(1.0, num_live=0) is None
    with pytest.raises(RoleChangeOvertaken):
        machine.ask(P, deadline_s=99)


@pytest.mark.parametrize("seed", range(20))
def test_walk(seed: int) -> None:
    """Every change that starts has one outcome; the version counts the roles; no work is taken
    between two roles, nor after the end."""
    rng = random.Random(seed)
    machine = RoleMachine(rng.choice(list(Role)))
    now_s, live, under_way = 0.0, 0, 0
    role, version = machine.role, 1
    has_ended = False
    for _ in range(600):
        now_s += rng.random()
        outcome = None
        match rng.choice(("ask", "ask", "leave", "look", "look", "submit", "done", "doubt", "end")):
            case "ask":
                target = rng.choice(list(Role))
                try:
                    asked = machine.ask(target, deadline_s=now_s + rng.uniform(0, 8))
                except RoleChangeRefused:
                    assert under_way and target is not machine.target
                except RoleChangeOvertaken:
                    assert has_ended
                else:
                    assert (asked is Asked.HAS_IT) == (target is role and not under_way)
                    under_way += asked is Asked.STARTED
            case "leave":
                machine.leave()
            case "look":
                outcome = machine.look(now_s, num_live=live)
                if outcome is not None and outcome.error is None:
                    assert live == 0
                    role, version = role.other, version + 1
            case "submit":
                live += machine.takes_work
            case "done":
                live = max(0, live - rng.randint(1, 4))
            case "doubt":
                outcome = machine.give_up(Unavailable("a registry is away"))
            case "end":
                if rng.random() < 0.02:
                    machine.end()
                    has_ended = True
                    outcome = machine.take_overtaken()
        if outcome is not None:
            under_way -= 1
        assert under_way == int(machine.is_changing)
        assert (machine.role, machine.version) == (role, version)
        assert machine.takes_work == (machine.state in (RoleState.SERVING, RoleState.ASKED))
        assert has_ended == (machine.state is RoleState.ENDING)
        machine.check_integrity()
