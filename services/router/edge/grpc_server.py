"""The router's gRPC front on one port: Inference, the Open Inference Protocol, grpc.health.v1 and
reflection.

Health says SERVING only while the dispatcher calls itself ready.
"""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.core.errors import ConfigError
from baton.core.metrics import REJECTED
from baton.rpc.channel import listen, new_server
from baton.rpc.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    open_inference_pb2,
    open_inference_pb2_grpc,
)
from baton.telemetry.metrics import Metrics
from services.router.edge.door_tls import DoorTls
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.grpc_api import InferenceApi
from services.router.edge.grpc_calls import is_ready
from services.router.edge.open_inference_api import OpenInferenceApi
from services.router.edge.preprocess import Preprocessor
from services.router.edge.undecodable import RefuseUndecodable
from services.router.requests.generation import Generator
from services.router.tenants.tenants import Tenants, open_to_all

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
OPEN_INFERENCE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
HEALTH_PERIOD_S = 0.5
CUT_AFTER_S = 0.5
"""Beyond `stop_grace_s`: for streams to end with the dispatcher's reason before they are cut."""


class GrpcServer:
    """start() → serving → stop()."""

    def __init__(
        self,
        generator: Generator,
        *,
        host: str,
        port: int,
        metrics: Metrics,
        config: EdgeConfig,
        tenants: Tenants | None = None,
        shares_port: bool = False,
        tls: DoorTls | None = None,
    ) -> None:
        """`tenants`: who may use it; by default everybody. `shares_port`: other processes of this
        user may listen there too; the port is taken by `start` then. Without `tls` it speaks plain
        text."""
        self._tls = None if tls is None else tls.grpc()
        self._generator = generator
        self._config = config
        self._preprocessor = Preprocessor(generator)
        self._health = health.aio.HealthServicer()
        undecodable = RefuseUndecodable(lambda: metrics.add(REJECTED, 1, "400"))
        self._server: grpc.aio.Server = new_server(
            max_receive_bytes=config.max_body_bytes,
            tls=self._tls,
            shares_port=shares_port,
            interceptors=[undecodable],
        )
        tenants = tenants or open_to_all(metrics)
        own = InferenceApi(
            generator, self._preprocessor, metrics=metrics, config=config, tenants=tenants
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(own, self._server)
        open_api = OpenInferenceApi(
            generator, self._preprocessor, metrics=metrics, config=config, tenants=tenants
        )
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(open_api, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (INFERENCE, OPEN_INFERENCE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._host = host
        # gRPC queues connections from here on; others would answer sooner.
        self.port = port if shares_port else self._bind(host, port)
        self._is_bound = not shares_port
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once calls are accepted. Raises ConfigError."""
        if not self._is_bound:
            self.port, self._is_bound = self._bind(self._host, self.port), True
        await self._report_health()
        await self._server.start()
        self._watch = asyncio.create_task(self._follow_health())

    async def stop(self) -> None:
        """Refuse new calls, let streams go on for `stop_grace_s`, then end them."""
        if self._watch is not None:
            self._watch.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._config.stop_grace_s + CUT_AFTER_S)
        self._preprocessor.close()

    async def _follow_health(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_PERIOD_S)
            await self._report_health()

    async def _report_health(self) -> None:
        response = health_pb2.HealthCheckResponse
        has_health = await is_ready(self._generator)
        status = response.SERVING if has_health else response.NOT_SERVING
        for name in ("", INFERENCE, OPEN_INFERENCE):
            await self._health.set(name, status)

    def _bind(self, host: str, port: int) -> int:
        """The port taken. Raises ConfigError."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        bound = listen(self._server, address, self._tls)
        if not bound:
            raise ConfigError(f"cannot listen on {address}; choose another port")
        return bound
