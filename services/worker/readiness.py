"""Is this worker one that routers should already count on? Told to probes by grpc.health.v1.

Ready is more than healthy: registered wherever it announces itself, every peer that a router has
named tried once, and not leaving. A peer that cannot be reached does not hold a worker back, since
what it would have read from there is computed instead.

Not known here: what healthy means (`health`), who probes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as grpc_health

READY_SERVICE = "baton.v1.Ready"
"""The name under which grpc.health.v1 answers for readiness; the empty name answers for health."""
PERIOD_S = 0.5


def reason_not_ready(
    *, is_healthy: bool, is_draining: bool, registered: Sequence[bool], num_untried_peers: int
) -> str | None:
    """Why probes are to be told no, None when ready. `registered`: one per registry."""
    if is_draining:
        return "it drains"
    if not is_healthy:
        return "it is not healthy"
    if not all(registered):
        return f"registered in {sum(registered)} of {len(registered)} registries"
    if num_untried_peers:
        return f"{num_untried_peers} peers have not been connected to yet"
    return None


class ReadySignal:
    """Keeps the status of READY_SERVICE up to date while `watch` runs."""

    def __init__(
        self, servicer: grpc_health.HealthServicer, reason: Callable[[], str | None]
    ) -> None:
        """`reason`: why not, None for ready; called on the event loop twice a second."""
        self._servicer = servicer
        self._reason = reason

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            is_ready = self._reason() is None
            await self._servicer.set(
                READY_SERVICE,
                health_pb2.HealthCheckResponse.SERVING
                if is_ready
                else health_pb2.HealthCheckResponse.NOT_SERVING,
            )
            await asyncio.sleep(PERIOD_S)
