"""Workers as Ray Serve knows them: the metadata of the pools' replicas.

Serve pushes the set of replicas of a deployment to every handle of it. The handle's request router
is the hook that sees these updates, so the pools are called through a router class that only
publishes them here; no request ever goes through the handles. (Choosing workers inside a request
router hangs or picks the wrong replica in Ray 2.60.)

Serve loads the router class by import path in the replica's process and pickles its globals by
value, hence the one module-level object, reached by an import inside the methods.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError

# The stable path ray.serve.request_router exports only the abstract base.
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.handle import DeploymentHandle

from baton.core.errors import ConfigError
from baton.core.worker_info import WorkerId, WorkerInfo
from baton.rpc.convert import worker_info_from_wire
from baton.rpc.v1 import worker_pb2
from services.router.workers.membership import PushMembership, Snapshot

logger = logging.getLogger(__name__)

MAX_REPORTED = 256


class ReplicaBoard:
    """The replicas of each deployment, as last published by Serve, from any thread."""

    def __init__(self) -> None:
        self._by_deployment: dict[str, Snapshot] = {}
        self._listener: tuple[asyncio.AbstractEventLoop, PushMembership] | None = None
        self._reported: set[str] = set()

    def listen(self, membership: PushMembership) -> None:
        """Push all further changes, and what is known now, to `membership` on this loop."""
        self._listener = (asyncio.get_running_loop(), membership)
        self._push()

    def publish(self, deployment: str, metadata: Mapping[str, Mapping[str, str] | None]) -> None:
        """Replace the replicas of one deployment; those without metadata are not ready yet."""
        workers: dict[WorkerId, str] = {}
        for record in metadata.values():
            if record and (info := self._read(deployment, record.get("worker_info"))) is not None:
                workers[info.worker_id] = info.address
        self._by_deployment[deployment] = workers
        self._push()

    def _read(self, deployment: str, text: str | None) -> WorkerInfo | None:
        """None for what is missing or makes no sense: one replica must not hide the others."""
        if text is None:
            return None
        try:
            return worker_info_from_wire(worker_pb2.WorkerInfo.FromString(bytes.fromhex(text)))
        except (ValueError, DecodeError, ConfigError) as error:
            reason = f"a replica of {deployment} is left out: {error}"
        if reason not in self._reported and len(self._reported) < MAX_REPORTED:
            self._reported.add(reason)
            logger.warning("%s", reason)
        return None

    def _push(self) -> None:
        if self._listener is None:
            return
        loop, membership = self._listener
        merged: dict[WorkerId, str] = {}
        for workers in self._by_deployment.values():
            merged.update(workers)
        loop.call_soon_threadsafe(membership.update, merged)


BOARD = ReplicaBoard()


class PublishingRequestRouter(PowerOfTwoChoicesRequestRouter):
    """Publishes what Serve tells it about the replicas of its deployment."""

    def update_replicas(self, replicas: list[Any]) -> None:
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self._publish()

    def _publish(self) -> None:
        from services.router.workers import ray_membership

        ray_membership.BOARD.publish(
            self._deployment_id.name,
            {r.replica_id.unique_id: r.replica_metadata for r in self._replicas.values()},
        )


def watch_replicas(handles: tuple[DeploymentHandle, ...]) -> PushMembership:
    """A membership that follows the replicas behind `handles`. Called on the router's loop."""
    from services.router.workers import ray_membership

    membership = PushMembership()
    ray_membership.BOARD.listen(membership)
    for handle in handles:
        # Start listening now; by itself a handle does so with its first request.
        handle._init()
    return membership
