"""What is begun for a decision: never more, never twice, never the wrong worker."""

from __future__ import annotations

import dataclasses
import random

import pytest

from baton.core.worker_info import Role
from services.planner.actuator import PlannedWorker, WorkerPhase
from services.planner.autoscale import Decision, PoolDecision
from services.planner.autoscale_config import AutoscaleConfig, PoolLimits
from services.planner.forecast import Forecast
from services.planner.orders import Order, OrderKind, orders

CONFIG = AutoscaleConfig(
    ttft_s=0.4, itl_s=0.04, max_devices=8, decode=PoolLimits(devices_per_worker=2)
)
START, DRAIN, CHANGE = OrderKind.START, OrderKind.DRAIN, OrderKind.CHANGE_ROLE


def decided(prefill: int, decode: int, num_role_changes: int = 0) -> Decision:
    return Decision(
        0.0,
        PoolDecision(prefill, 0, 0, 0, 1.0, ""),
        PoolDecision(decode, 0, 0, 0, 1.0, ""),
        num_role_changes,
        Forecast(0.0, 0.0, 0.0, 1.0, 0.0),
        False,
    )


def pool(role: Role, *phases: WorkerPhase) -> list[PlannedWorker]:
    return [
        PlannedWorker(
            f"{role.value}-{i}", role, phase,
            10.0 * i if phase is WorkerPhase.READY else float("-inf"),
        )
        for i, phase in enumerate(phases)
    ]  # fmt: skip


READY, STARTING, DRAINING = WorkerPhase.READY, WorkerPhase.STARTING, WorkerPhase.DRAINING


def test_pools_that_are_as_decided_are_left_alone() -> None:
    workers = [*pool(Role.PREFILL, READY), *pool(Role.DECODE, STARTING, DRAINING)]
    assert orders(decided(1, 1), workers, CONFIG) == []


def test_missing_workers_are_started_within_the_devices_that_are_free() -> None:
    workers = [*pool(Role.PREFILL, READY, DRAINING), *pool(Role.DECODE, READY)]
    assert orders(decided(2, 2), workers, CONFIG) == [
        Order(START, Role.PREFILL),
        Order(START, Role.DECODE),
    ]
    # Of 8 devices 4 are held: 2 more prefill workers leave room for one decode worker.
    assert orders(decided(3, 3), workers, CONFIG) == [
        Order(START, Role.PREFILL),
        Order(START, Role.PREFILL),
        Order(START, Role.DECODE),
    ]


def test_starting_workers_go_first_then_the_youngest() -> None:
    workers = pool(Role.PREFILL, READY, READY, STARTING, DRAINING)
    found = orders(decided(1, 0), workers, CONFIG)
    assert found == [
        Order(DRAIN, Role.PREFILL, "prefill-2"),
        Order(DRAIN, Role.PREFILL, "prefill-1"),
    ]


def test_workers_that_change_their_role_are_neither_drained_nor_started() -> None:
    workers = [*pool(Role.PREFILL, READY, READY, READY), *pool(Role.DECODE, READY)]
    assert orders(decided(1, 3, 2), workers, dataclasses.replace(CONFIG, max_devices=20)) == [
        Order(CHANGE, Role.DECODE, "prefill-2"),
        Order(CHANGE, Role.DECODE, "prefill-1"),
    ]
    workers = [*pool(Role.PREFILL, READY), *pool(Role.DECODE, STARTING, READY, READY)]
    assert orders(decided(2, 1, -1), workers, CONFIG) == [
        Order(CHANGE, Role.PREFILL, "decode-2"),
        Order(DRAIN, Role.DECODE, "decode-0"),
    ]


def test_workers_that_have_refused_another_role_are_not_asked() -> None:
    old, young = pool(Role.PREFILL, READY, READY)
    workers = [old, dataclasses.replace(young, is_settled=True), *pool(Role.DECODE, READY)]
    assert orders(decided(1, 2, 1), workers, CONFIG) == [Order(CHANGE, Role.DECODE, old.name)]


@pytest.mark.parametrize("seed", range(20))
def test_any_orders_lead_to_what_was_decided_or_stop_at_the_devices(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        workers = [
            *pool(Role.PREFILL, *rng.choices(list(WorkerPhase), k=rng.randrange(6))),
            *pool(Role.DECODE, *rng.choices(list(WorkerPhase), k=rng.randrange(6))),
        ]
        wanted = {Role.PREFILL: rng.randrange(6), Role.DECODE: rng.randrange(6)}
        found = orders(
            decided(wanted[Role.PREFILL], wanted[Role.DECODE], rng.randrange(-2, 3)),
            workers,
            CONFIG,
        )
        names = [order.worker for order in found if order.worker]
        assert len(set(names)) == len(names)
        phases = {w.name: w.phase for w in workers}
        assert all(phases[name] is not DRAINING for name in names)
        changed = {o.worker: o.role for o in found if o.kind is CHANGE}
        assert all(phases[name] is READY for name in changed)
        gone = {o.worker for o in found if o.kind is DRAIN}
        started = [o.role for o in found if o.kind is START]
        for role in Role:
            stay = [
                w for w in workers
                if w.phase is not DRAINING and w.name not in gone
                and changed.get(w.name, w.role) is role
            ]  # fmt: skip
            num = len(stay) + started.count(role)
            assert num <= wanted[role] or role in changed.values()
            each = 2 if role is Role.DECODE else 1
            used = sum(2 if w.role is Role.DECODE else 1 for w in workers) + sum(
                2 if r is Role.DECODE else 1 for r in started
            )
            assert num >= wanted[role] or used + each > CONFIG.max_devices
        assert not started or used <= CONFIG.max_devices
