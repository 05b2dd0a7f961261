"""Wires the parts of one worker together. Starts nothing."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.clock import MonotonicClock, WallClock
from baton.core.worker_info import WorkerInfo
from baton.rpc.v1 import transfer_pb2, worker_pb2
from kvtransfer.fetcher import FetchLimits
from kvtransfer.owner import LeaseOwner, OwnerLimits
from services.worker.backend import Backend
from services.worker.config import WorkerConfig
from services.worker.drain import Drain
from services.worker.engine_loop import EngineLoop
from services.worker.health import Health
from services.worker.requests import Requests
from services.worker.session import Sessions
from services.worker.session_server import WorkerServicer
from services.worker.transfer_client import TransferClient
from services.worker.transfer_server import LeaseServer, TransferServicer

SERVICE_NAMES: tuple[str, ...] = (
    worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name,
    transfer_pb2.DESCRIPTOR.services_by_name["Transfer"].full_name,
)


@dataclass(frozen=True, slots=True)
class Parts:
    """The running parts of one worker."""

    engine: EngineLoop
    requests: Requests
    leases: LeaseServer
    reads: TransferClient
    drain: Drain
    health: Health
    sessions: Sessions
    worker_service: WorkerServicer
    transfer_service: TransferServicer


def assemble(config: WorkerConfig, info: WorkerInfo, backend: Backend, secret: bytes) -> Parts:
    """Everything between the backend and the gRPC server. Call on the event loop."""
    clock = MonotonicClock()
    transfer = config.transfer
    sessions = Sessions()
    requests = Requests(sessions)
    engine = EngineLoop(backend.engine, on_step=requests.on_step, clock=clock, cores=backend.cores)
    limits = OwnerLimits(lease_s=transfer.lease_s)
    leases = LeaseServer(LeaseOwner(epoch=info.epoch, clock=clock, limits=limits), engine=engine)
    reads = TransferClient(
        myself=info,
        transport=backend.transport,
        outcome=requests,
        clock=clock,
        wall_clock=WallClock(),
        limits=FetchLimits(
            read_timeout_s=transfer.read_timeout_s, link_grace_s=transfer.link_grace_s
        ),
        connect_timeout_s=transfer.connect_timeout_s,
    )
    requests.attach(engine, leases, reads)
    drain = Drain(engine=engine, requests=requests, clock=clock)
    return Parts(
        engine=engine,
        requests=requests,
        leases=leases,
        reads=reads,
        drain=drain,
        health=Health(
            engine,
            config.health,
            service_names=SERVICE_NAMES,
            on_verdict=lambda verdict: requests.set_unhealthy(not verdict.is_healthy),
        ),
        sessions=sessions,
        worker_service=WorkerServicer(
            info=info,
            engine=engine,
            requests=requests,
            sessions=sessions,
            drain=drain,
            config=config.session,
        ),
        transfer_service=TransferServicer(
            leases, backend.transport, layout=info.layout, secret=secret
        ),
    )
