"""The shared state that a router's settings name."""

from __future__ import annotations

from baton.telemetry.metrics import Metrics
from services.router.shared.config import SharedConfig, SharedPlace
from services.router.shared.process_state import ProcessState
from services.router.shared.remote_state import RemoteState
from services.router.shared.state import SharedBackend, SharedState
from services.router.shared.telemetry import SharedTelemetry


def open_shared(config: SharedConfig, *, copy_id: str, metrics: Metrics) -> SharedState:
    """Not started. `copy_id`: this router's id, unique over copies and starts."""
    place = config.found_place
    if place is SharedPlace.PROCESS:
        telemetry = SharedTelemetry(metrics, SharedBackend.PROCESS)
        telemetry.set_copies(config.num_copies)
        return ProcessState(num_copies=config.num_copies, telemetry=telemetry)
    if place is SharedPlace.RAY:
        # Ray is not needed, and may not be installed, where it keeps nothing.
        from services.router.shared.ray_store import RayStore

        return RemoteState(
            RayStore(config.deployment),
            backend=SharedBackend.RAY,
            copy_id=copy_id,
            config=config,
            telemetry=SharedTelemetry(metrics, SharedBackend.RAY),
        )
    from services.router.shared.redis_store import RedisStore

    assert config.url is not None
    telemetry = SharedTelemetry(metrics, SharedBackend.REDIS)
    return RemoteState(
        RedisStore(config.url, deployment=config.deployment, on_garbage=telemetry.garbage),
        backend=SharedBackend.REDIS,
        copy_id=copy_id,
        config=config,
        telemetry=telemetry,
    )
