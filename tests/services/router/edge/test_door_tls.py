"""TLS at the front doors: who gets in, who does not and what is said of it, renewal."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest

from baton.core.errors import ConfigError
from baton.core.metrics import REFUSED_HANDSHAKES
from baton.rpc import tls as rpc_tls
from baton.rpc.v1 import inference_pb2, inference_pb2_grpc
from baton.telemetry.metrics import Metrics
from certificates import make_certificates, reissue
from services.router.config import RouterConfig
from services.router.copy_config import CopyConfig
from services.router.edge import door_tls
from services.router.edge.door_tls import DoorTls, Refusal, open_door_tls
from services.router.edge.door_tls_config import DoorTlsConfig
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.grpc_server import GrpcServer
from services.router.edge.http_app import HttpApp
from services.router.edge.http_server import HttpServer
from services.router.edge.own_door import OwnDoor
from services.router.pool_stats import PoolStats

NAME = "localhost"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return make_certificates(tmp_path / "ours", NAME)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return make_certificates(tmp_path / "theirs", NAME)


def config_of(folder: Path, *, asks_clients: bool = False) -> DoorTlsConfig:
    return DoorTlsConfig(
        folder / "router.pem",
        folder / "router-key.pem",
        folder / "ca.pem" if asks_clients else None,
    )


class Doors:
    """Both doors with the certificates of a folder."""

    def __init__(self, generator, config: EdgeConfig, tls: DoorTlsConfig) -> None:
        self.metrics = Metrics()
        door = open_door_tls(tls, self.metrics)
        self.app = HttpApp(generator, metrics=self.metrics, config=config)
        common = {"host": "127.0.0.1", "port": 0, "config": config, "tls": door}
        self.http = HttpServer(self.app, **common)
        self.grpc = GrpcServer(generator, metrics=self.metrics, **common)

    @property
    def url(self) -> str:
        return f"https://{NAME}:{self.http.port}"

    def refused(self) -> dict[str, float]:
        lines = self.metrics.render().decode().splitlines()
        counts = (line.split() for line in lines if line.startswith(REFUSED_HANDSHAKES.name))
        return {labels.split('"')[1]: float(count) for labels, count in counts if float(count) > 0}


@pytest.fixture
async def open_doors(generator, edge_config) -> AsyncIterator:
    opened: list[Doors] = []

    async def open_them(tls: DoorTlsConfig) -> Doors:
        doors = Doors(generator, edge_config, tls)
        opened.append(doors)
        await doors.http.start()
        await doors.grpc.start()
        return doors

    yield open_them
    for doors in opened:
        await doors.http.stop()
        await doors.grpc.stop()


def client_of(ca: Path, shown: Path | None = None, role: str = "worker") -> httpx.AsyncClient:
    """Trusts the CA in `ca`, and shows the certificate of `role` in `shown`."""
    context = ssl.create_default_context(cafile=str(ca / "ca.pem"))
    if shown is not None:
        context.load_cert_chain(shown / f"{role}.pem", shown / f"{role}-key.pem")
    return httpx.AsyncClient(verify=context, timeout=10, trust_env=False)


async def chat_status(client: httpx.AsyncClient, doors: Doors) -> int:
    return (await client.post(f"{doors.url}/v1/chat/completions", json=CHAT)).status_code


async def chat_over_grpc(doors: Doors, ca: Path, shown: Path | None = None) -> str:
    credentials = grpc.ssl_channel_credentials(
        (ca / "ca.pem").read_bytes(),
        None if shown is None else (shown / "worker-key.pem").read_bytes(),
        None if shown is None else (shown / "worker.pem").read_bytes(),
    )
    async with grpc.aio.secure_channel(f"{NAME}:{doors.grpc.port}", credentials) as channel:
        request = inference_pb2.ChatRequest(
            model="tiny", messages=[inference_pb2.ChatMessage(role="user", content="hi")]
        )
        call = inference_pb2_grpc.InferenceStub(channel).Chat(request, timeout=5)
        return "".join([delta.text async for delta in call])


async def test_both_doors_answer_over_tls(open_doors, ours) -> None:
    doors = await open_doors(config_of(ours))
    async with client_of(ours) as client:
        assert await chat_status(client, doors) == 200
        url = f"{doors.url}/v1/chat/completions"
        async with client.stream("POST", url, json=CHAT | {"stream": True}) as answer:
            lines = [line async for line in answer.aiter_lines()]
    assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"
    assert await chat_over_grpc(doors, ours) == "Hello, world"
    assert doors.refused() == {}


async def test_plain_text_is_refused_and_counted(open_doors, ours, caplog) -> None:
    doors = await open_doors(config_of(ours))
    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.TransportError), caplog.at_level(logging.WARNING):
            await client.get(f"http://{NAME}:{doors.http.port}/health")
    assert doors.refused() == {"plain_text": 1}
    assert "spoke plain text" in caplog.text
    with pytest.raises(grpc.aio.AioRpcError):
        async with grpc.aio.insecure_channel(f"{NAME}:{doors.grpc.port}") as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            [_ async for _ in stub.Chat(inference_pb2.ChatRequest(model="tiny"), timeout=5)]


async def test_a_client_that_does_not_trust_us_is_counted(open_doors, ours, theirs) -> None:
    doors = await open_doors(config_of(ours))
    context = ssl.create_default_context(cafile=str(theirs / "ca.pem"))

    def dial() -> None:
        # Unlike clients on an event loop, a socket also says why it goes.
        with socket.create_connection((NAME, doors.http.port)) as raw:
            context.wrap_socket(raw, server_hostname=NAME)

    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.to_thread(dial)
    async with asyncio.timeout(5):
        while doors.refused() != {"by_client": 1}:
            await asyncio.sleep(0.01)


async def test_clients_need_a_certificate_of_the_named_ca(open_doors, ours, theirs, caplog) -> None:
    doors = await open_doors(config_of(ours, asks_clients=True))
    reissue(ours, "old", NAME, shift_days=-3)
    caplog.set_level(logging.WARNING)
    for shown, role, reason in (
        (None, "", "missing"),
        (theirs, "worker", "foreign"),
        (ours, "old", "expired"),
    ):
        before = doors.refused().get(reason, 0)
        for _ in range(3):
            async with client_of(ours, shown, role) as client:
                with pytest.raises(httpx.TransportError):
                    await chat_status(client, doors)
        assert doors.refused()[reason] == before + 3
        # One line for the three of them.
        assert caplog.text.count(Refusal[reason.upper()].value) == 1
    async with client_of(ours, ours) as client:
        assert await chat_status(client, doors) == 200
    assert await chat_over_grpc(doors, ours, ours) == "Hello, world"
    for shown in (None, theirs):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await chat_over_grpc(doors, ours, shown)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def serial_of(doors: Doors, ca: Path) -> str:
    context = ssl.create_default_context(cafile=str(ca / "ca.pem"))
    _, writer = await asyncio.open_connection(NAME, doors.http.port, ssl=context)
    serial = writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
    writer.close()
    await writer.wait_closed()
    return serial


async def test_a_renewed_certificate_is_shown_without_a_restart(open_doors, ours, caplog) -> None:
    caplog.set_level(logging.INFO)
    doors = await open_doors(config_of(ours))
    before = await serial_of(doors, ours)
    async with client_of(ours) as client:
        assert await chat_status(client, doors) == 200
        reissue(ours, "router", NAME)
        # Its connection lives on with the certificate it began with.
        assert await chat_status(client, doors) == 200
    after = await serial_of(doors, ours)
    assert after != before
    assert await chat_over_grpc(doors, ours) == "Hello, world"
    # Half replaced: the pair in use stays.
    (ours / "router-key.pem").write_bytes((ours / "worker-key.pem").read_bytes())
    assert await serial_of(doors, ours) == after
    assert await chat_over_grpc(doors, ours) == "Hello, world"
    assert caplog.text.count("is not the key of") == 1


async def test_the_plain_text_port_has_metrics_and_health_alone(
    generator, edge_config, ours, tmp_path
) -> None:
    for tls, status in ((DoorTlsConfig(), 200), (config_of(ours), 404)):
        config = RouterConfig(
            model_path=tmp_path,
            copy=CopyConfig(own_port=0),
            edge=dataclasses.replace(edge_config, tls=tls),
        )
        app = HttpApp(
            generator, metrics=Metrics(), config=config.edge, pool_stats=lambda: PoolStats(1.0)
        )
        door = OwnDoor(app, config)
        await door.start()
        assert door.port is not None
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{door.port}", trust_env=False
        ) as client:
            for path in ("/health", "/version", "/metrics", "/pool_stats"):
                assert (await client.get(path)).status_code == 200
            for path in ("/v1/models", "/v1/../v1/models"):
                assert (await client.get(path)).status_code == status
            answer = await client.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == status
            if status == 404:
                assert "the API is at the port with TLS" in answer.json()["error"]["message"]
        await door.stop()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (("router.pem", None, None), "edge.tls.key_file is not set"),
        ((None, None, "ca.pem"), "edge.tls.cert_file and key_file"),
        (("none.pem", "router-key.pem", None), r"edge.tls.cert_file .*none.pem does not exist"),
        (("router.pem", "worker-key.pem", None), "is not the key of edge.tls.cert_file"),
        (("router.pem", "ca.pem", None), "hold no certificate and key in PEM form"),
        (("router.pem", "router-key.pem", "router-key.pem"), "client_ca_file .* no certificate"),
        (("old.pem", "old-key.pem", None), "would be refused by clients: certificate has expired"),
        (("early.pem", "early-key.pem", None), "certificate is not yet valid"),
    ],
)
def test_wrong_files_are_named_at_the_start(ours, files, reason) -> None:
    reissue(ours, "old", NAME, shift_days=-3)
    reissue(ours, "early", NAME, shift_days=3)
    paths = [None if name is None else ours / name for name in files]
    with pytest.raises(ConfigError, match=reason):
        open_door_tls(DoorTlsConfig(*paths), Metrics())


async def test_grpc_connections_without_a_call_are_counted(
    open_doors, ours, theirs, monkeypatch
) -> None:
    monkeypatch.setattr(rpc_tls, "SILENT_AFTER_S", 0.05)
    doors = await open_doors(config_of(ours, asks_clients=True))
    with pytest.raises(grpc.aio.AioRpcError):
        await chat_over_grpc(doors, ours, theirs)
    await asyncio.sleep(0.1)
    # Looked at when somebody else connects.
    assert await chat_over_grpc(doors, ours, ours) == "Hello, world"
    assert set(doors.refused()) == {"no_call"}


def test_the_log_is_not_flooded(ours, caplog) -> None:
    now_s = 0.0
    seen: list[Refusal] = []
    log = door_tls.RefusalLog(seen.append, now=lambda: now_s)
    error = ssl.SSLError(1, "x")
    error.reason = "TEST"
    for _ in range(1000):
        log.failed(error)
    now_s = 61.0
    log.failed(error)
    assert len(seen) == 1001
    assert [r.getMessage().split(",")[1] for r in caplog.records] == [
        " 1 so far for this reason: the handshake failed (TEST)",
        " 1001 so far for this reason: the handshake failed (TEST)",
    ]


def test_doors_without_certificates_speak_plain_text() -> None:
    assert open_door_tls(DoorTlsConfig(), Metrics()) is None
    assert set(REFUSED_HANDSHAKES.values[0][1]) == {refusal.label for refusal in Refusal}


def test_material_is_read_once_while_nothing_changes(ours) -> None:
    tls = DoorTls(config_of(ours), on_refused=lambda why: None)
    assert tls.current() is tls.current()
