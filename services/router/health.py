"""Whether the router is ready, judged by tokens and answers, never by "the process exists".

Pure: the dispatcher collects the observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.worker_info import Role
from services.router.config import HealthConfig
from services.router.requests.generation import Health
from services.router.shared.state import SharedStatus
from services.router.workers.cluster_view import WorkerState


@dataclass(frozen=True, slots=True)
class Observations:
    """Ages in seconds; None where it never happened."""

    workers: Sequence[WorkerState]
    num_in_flight: int = 0
    oldest_wait_s: float = 0.0
    """Longest time that a request in flight has been without a token."""
    token_age_s: float | None = None
    """Since the last token of any request."""
    progress_age_s: float | None = None
    """Since any worker last computed something."""
    shared: SharedStatus | None = None


def assess(seen: Observations, config: HealthConfig) -> Health:
    """Green with a recent token, or when idle workers of the required pools answer."""
    answering = [w for w in seen.workers if w.is_eligible and w.load_age_s <= config.load_fresh_s]
    missing = [
        role.value
        for role in config.required_roles
        if not any(w.info.role is role for w in answering)
    ]
    detail: dict[str, object] = {
        "requests_in_flight": seen.num_in_flight,
        "seconds_since_token": _rounded(seen.token_age_s),
        "workers_answering": {
            role.value: sum(1 for w in answering if w.info.role is role) for role in Role
        },
        "workers_known": len(seen.workers),
        **({} if seen.shared is None else {"shared_state": _shared_detail(seen.shared)}),
    }

    def verdict(is_ready: bool, reason: str) -> Health:
        return Health(is_ready, reason, detail)

    if not answering:
        return verdict(False, f"none of {len(seen.workers)} known workers answers")
    if seen.num_in_flight:
        ages = [a for a in (seen.token_age_s, seen.progress_age_s) if a is not None]
        stuck_s = min([seen.oldest_wait_s, *ages])
        if stuck_s > config.token_fresh_s:
            return verdict(
                False, f"{seen.num_in_flight} requests in flight, no progress for {stuck_s:.0f} s"
            )
    is_producing = seen.token_age_s is not None and seen.token_age_s <= config.token_fresh_s
    if missing and not is_producing:
        return verdict(False, f"no {' and no '.join(missing)} worker answers")
    if missing:
        return verdict(True, f"degraded: no {' and no '.join(missing)} worker answers")
    if is_producing:
        return verdict(True, "tokens are produced")
    if seen.num_in_flight:
        return verdict(True, "workers are computing")
    return verdict(True, "idle, workers answer")


def _shared_detail(shared: SharedStatus) -> dict[str, object]:
    """A store that is away takes no router out of service: it goes on from its last view."""
    return {
        "backend": shared.backend.value,
        "is_up": shared.is_up,
        "seconds": round(shared.since_s, 1),
        "routers": shared.num_copies,
        **({"reason": shared.reason} if shared.reason else {}),
    }


def _rounded(age_s: float | None) -> float | None:
    return None if age_s is None else round(age_s, 3)
