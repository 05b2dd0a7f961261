"""The front doors over a router's core, the same wherever it runs.

Does not know: what carries HTTP, when the doors open.
"""

from __future__ import annotations

from services.router.config import RouterConfig
from services.router.core import RouterCore
from services.router.edge.door_tls import DoorTls
from services.router.edge.grpc_server import GrpcServer
from services.router.edge.http_app import HttpApp
from services.router.ui.ui_routes import open_ui_routes


def open_http_app(core: RouterCore, config: RouterConfig) -> HttpApp:
    return HttpApp(
        core.dispatcher,
        metrics=core.metrics,
        config=config.edge,
        tenants=core.tenants,
        pool_stats=core.pool_stats,
        ui=open_ui_routes(core.ui, core.tenants, config.tenants),
    )


def open_grpc_server(core: RouterCore, config: RouterConfig, tls: DoorTls | None) -> GrpcServer:
    """Takes the port. Raises ConfigError."""
    return GrpcServer(
        core.dispatcher,
        host=config.host,
        port=config.grpc_port,
        metrics=core.metrics,
        config=config.edge,
        tenants=core.tenants,
        shares_port=config.copy.shares_ports,
        tls=tls,
    )
