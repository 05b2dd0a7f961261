"""Wires the parts of one worker together. Starts nothing."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.clock import Clock, MonotonicClock, WallClock
from baton.core.errors import ConfigError
from baton.core.fabric import FabricCounters
from baton.core.tls import TlsFiles
from baton.core.worker_info import WorkerInfo
from baton.registry.directory import DirectoryRegistry
from baton.rpc.v1 import transfer_pb2, worker_pb2
from kvtransfer.fetch_state import FetchLimits
from kvtransfer.group_transport import GroupTransport
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.owner import LeaseOwner, OwnerLimits
from kvtransfer.transport import Transport
from services.worker.backend import Backend
from services.worker.config import WorkerConfig
from services.worker.drain import Drain
from services.worker.engine_loop import EngineLoop
from services.worker.fabric import Fabric
from services.worker.health import Health
from services.worker.lease_server import LeaseServer
from services.worker.link_check import LinkCheck
from services.worker.mesh import Mesh
from services.worker.peer_gate import PeerGate
from services.worker.peer_members import PeerMembers
from services.worker.prefix_imports import ImportLimits, PrefixImports
from services.worker.rates import PrefillRate
from services.worker.requests import Requests
from services.worker.role_change import RoleChanger
from services.worker.role_state import RoleMachine
from services.worker.session import Sessions
from services.worker.session_server import WorkerServicer
from services.worker.tier_backend import build_tiering
from services.worker.tiering import Tiering
from services.worker.transfer_client import TransferClient
from services.worker.transfer_server import TransferServicer

ORPHAN_GRACES = 2.5
"""Readers give up `transfer.link_grace_s` after their streams broke; what they had asked for is
kept for them a little longer than that."""
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
    mesh: Mesh
    reads: TransferClient
    imports: PrefixImports
    tiering: Tiering | None
    fabric: Fabric
    drain: Drain
    roles: RoleChanger
    health: Health
    sessions: Sessions
    worker_service: WorkerServicer
    transfer_service: TransferServicer


def assemble(
    config: WorkerConfig,
    info: WorkerInfo,
    backend: Backend,
    secret: bytes,
    tls: TlsFiles | None = None,
    *,
    fixed_role: str = "",
) -> Parts:
    """Everything between the backend and the gRPC server. Call on the event loop.

    `fixed_role`: why the worker never changes its role, empty where it may.
    """
    clock, transport = MonotonicClock(), backend.transport
    sessions = Sessions()
    fabric = Fabric(sessions)
    role_state = RoleMachine(info.role)
    requests = Requests(sessions, role_state)
    engine = EngineLoop(backend.engine, on_step=requests.on_step, clock=clock, cores=backend.cores)
    leases = _leases(config, info, engine, clock)
    engine.tell_layers(leases.announce_layers)
    mesh = Mesh(
        myself=info,
        transport=transport,
        fabric=fabric,
        clock=clock,
        connect_timeout_s=config.transfer.connect_timeout_s,
        tls=tls,
    )
    reads = _reads(config, mesh, transport, requests, clock)
    mesh.attach(reads)
    tiering = _tiering(config, backend, engine)
    imports = _imports(config, info, engine, reads, tiering, fabric, requests)
    requests.attach(engine, leases, reads, imports, tiering)
    gate = _gate(config, info, secret, clock)
    _report_all(fabric, leases, reads, tiering, gate, transport)
    roles = RoleChanger(
        info,
        role_state,
        engine_config=config.engine,
        other_engine=config.other_engine,
        engine=engine,
        requests=requests,
        sessions=sessions,
        clock=clock,
        fixed_because=fixed_role,
    )
    drain = Drain(engine=engine, requests=requests, clock=clock, has_mates=roles.has_mates)
    health = Health(
        engine,
        config.health,
        service_names=SERVICE_NAMES,
        on_verdict=lambda verdict: requests.set_unhealthy(not verdict.is_healthy),
    )
    worker_service = WorkerServicer(
        roles=roles,
        engine=engine,
        requests=requests,
        sessions=sessions,
        drain=drain,
        fabric=fabric,
        mesh=mesh,
        gate=gate,
        config=config.session,
    )
    links = LinkCheck(
        mesh,
        transport,
        fabric,
        myself=info,
        connect_timeout_s=config.transfer.connect_timeout_s,
    )
    transfer_service = TransferServicer(leases, gate=gate, transport=transport, links=links)
    return Parts(
        engine,
        requests,
        leases,
        mesh,
        reads,
        imports,
        tiering,
        fabric,
        drain,
        roles,
        health,
        sessions,
        worker_service,
        transfer_service,
    )


def _leases(
    config: WorkerConfig, info: WorkerInfo, engine: EngineLoop, clock: Clock
) -> LeaseServer:
    transfer = config.transfer
    limits = OwnerLimits(lease_s=transfer.lease_s, orphan_s=ORPHAN_GRACES * transfer.link_grace_s)
    return LeaseServer(LeaseOwner(epoch=info.epoch, clock=clock, limits=limits), engine=engine)


def _reads(
    config: WorkerConfig, mesh: Mesh, transport: Transport, requests: Requests, clock: Clock
) -> TransferClient:
    limits = FetchLimits(
        read_timeout_s=config.transfer.read_timeout_s, link_grace_s=config.transfer.link_grace_s
    )
    return TransferClient(
        mesh=mesh,
        transport=transport,
        outcome=requests,
        clock=clock,
        wall_clock=WallClock(),
        limits=limits,
    )


def _tiering(config: WorkerConfig, backend: Backend, engine: EngineLoop) -> Tiering | None:
    if not config.tiers.is_enabled:
        return None
    if backend.region is None or not config.engine.enable_prefix_caching:
        raise ConfigError(
            f"tiers.host_bytes is {config.tiers.host_bytes} on a worker whose blocks cannot be "
            "saved: it needs engine.enable_prefix_caching and a pool of its own; set it to 0"
        )
    return build_tiering(config.tiers, backend.region, engine)


def _imports(
    config: WorkerConfig,
    info: WorkerInfo,
    engine: EngineLoop,
    reads: TransferClient,
    tiering: Tiering | None,
    fabric: Fabric,
    requests: Requests,
) -> PrefixImports:
    transfer = config.transfer
    limits = ImportLimits(
        block_size=info.layout.block_size,
        block_bytes=info.layout.block_bytes,
        max_wait_share=transfer.max_fetch_share,
        max_wait_s=transfer.read_timeout_s,
    )
    may_fetch = transfer.enable_prefix_fetch and config.engine.enable_prefix_caching
    return PrefixImports(
        myself=info,
        engine=engine,
        reads=reads if may_fetch else None,
        tiers=tiering,
        link=fabric.link,
        rate=PrefillRate(),
        limits=limits,
        released=requests.released,
    )


def _gate(config: WorkerConfig, info: WorkerInfo, secret: bytes, clock: Clock) -> PeerGate:
    settings = config.registry
    registry = None
    if settings.directory is not None and not settings.directory_is_local:
        registry = DirectoryRegistry(settings.directory, clock=clock)
    return PeerGate(
        secret=secret,
        layout=info.layout,
        members=PeerMembers(registry),
        clock=clock,
        wall_clock=WallClock(),
    )


def _report_all(
    fabric: Fabric,
    leases: LeaseServer,
    reads: TransferClient,
    tiering: Tiering | None,
    gate: PeerGate,
    transport: Transport,
) -> None:
    """What the fabric report collects from other parts."""

    def count(counters: FabricCounters) -> None:
        reads.count(counters)
        counters.expired_leases = leases.num_expired_leases
        counters.refused_peers += gate.num_refused
        if isinstance(transport, (GroupTransport, MoverTransport)):
            counters.recycles = transport.num_recycles
        if tiering is not None:
            tiering.count(counters)

    fabric.add_counts(count)
    if tiering is not None:
        fabric.attach_tiers(tiering.reports)
