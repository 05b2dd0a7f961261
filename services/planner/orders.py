"""What is to be done so that the pools become what was decided. Pure.

Workers that change their role go first, then the rest is started and drained. Starting workers are
given up before ready ones, and young ones before old ones: the old ones hold the prefixes. Nothing
is started on a device that a draining worker still holds; it comes with a later decision.

Does not know: how anything is done, why it was decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from baton.core.worker_info import Role
from services.planner.actuator import PlannedWorker, WorkerPhase
from services.planner.autoscale import Decision
from services.planner.autoscale_config import AutoscaleConfig


class OrderKind(Enum):
    START = "start"
    DRAIN = "drain"
    CHANGE_ROLE = "change_role"


@dataclass(frozen=True, slots=True)
class Order:
    kind: OrderKind
    role: Role
    """Of the worker from then on."""
    worker: str = ""
    """Empty for one that is to be started."""


def orders(
    decision: Decision, workers: Sequence[PlannedWorker], config: AutoscaleConfig
) -> list[Order]:
    """Empty where the pools are, or are becoming, what was decided."""
    pools = {role: _going(workers, role) for role in Role}
    given = _changes(decision, pools)
    for order in given:
        lender = Role.DECODE if order.role is Role.PREFILL else Role.PREFILL
        moved = next(w for w in pools[lender] if w.name == order.worker)
        pools[lender].remove(moved)
        pools[order.role].append(moved)
    wanted = {Role.PREFILL: decision.prefill.desired, Role.DECODE: decision.decode.desired}
    for role, going in pools.items():
        surplus = max(0, len(going) - wanted[role])
        busy = {order.worker for order in given}
        spare = [w for w in going if w.name not in busy]
        given += [Order(OrderKind.DRAIN, role, w.name) for w in spare[:surplus]]
    free = config.max_devices - sum(_devices(config, w.role) for w in workers)
    for role, going in pools.items():
        for _ in range(wanted[role] - len(going)):
            free -= _devices(config, role)
            if free >= 0:
                given.append(Order(OrderKind.START, role))
    return given


def _changes(decision: Decision, pools: dict[Role, list[PlannedWorker]]) -> list[Order]:
    num = decision.num_role_changes
    lender, borrower = (
        (Role.PREFILL, Role.DECODE) if num > 0 else (Role.DECODE, Role.PREFILL)
    )  # fmt: skip
    ready = [w for w in pools[lender] if w.phase is WorkerPhase.READY and not w.is_settled]
    return [Order(OrderKind.CHANGE_ROLE, borrower, w.name) for w in ready[: abs(num)]]


def _going(workers: Sequence[PlannedWorker], role: Role) -> list[PlannedWorker]:
    """Those that stay unless told otherwise; who is given up first comes first."""
    mine = [w for w in workers if w.role is role and w.phase is not WorkerPhase.DRAINING]
    return sorted(mine, key=lambda w: (w.phase is WorkerPhase.READY, -w.joined_s, w.name))


def _devices(config: AutoscaleConfig, role: Role) -> int:
    limits = config.prefill if role is Role.PREFILL else config.decode
    return limits.devices_per_worker
