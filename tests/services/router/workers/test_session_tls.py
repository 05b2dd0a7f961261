"""Why a router has no session with a worker, when it is a matter of certificates."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from unittest.mock import Mock

import pytest

from baton.core.tls import TlsFiles
from baton.rpc.channel import listen, new_server
from baton.rpc.tls import ServerTls
from certificates import make_certificates, tls_files
from services.router.config import SessionConfig
from services.router.workers.session_client import WorkerSession


@pytest.mark.parametrize(
    ("is_router_secure", "is_worker_secure", "reason"),
    [
        (True, False, "it speaks plain text and this process TLS"),
        (False, True, "it speaks TLS and this process plain text"),
        (True, True, "its certificate was refused: it is not of the CA in tls.ca_file"),
    ],
)
async def test_reason_is_logged_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    is_router_secure: bool,
    is_worker_secure: bool,
    reason: str,
) -> None:
    def files(name: str, is_secure: bool) -> TlsFiles | None:
        return tls_files(make_certificates(tmp_path / name)) if is_secure else None

    worker_files = files("worker", is_worker_secure)
    server_tls = None if worker_files is None else ServerTls(worker_files)
    server = new_server(tls=server_tls)
    port = listen(server, "127.0.0.1:0", server_tls)
    await server.start()
    session = WorkerSession(
        f"127.0.0.1:{port}",
        router_id="router",
        config=SessionConfig(backoff_min_s=0.05, backoff_max_s=0.1),
        listener=Mock(),
        tls=files("router", is_router_secure),
    )
    with caplog.at_level(logging.WARNING, "services.router"):
        running = asyncio.create_task(session.run())
        async with asyncio.timeout(10):
            while reason not in session.lost_reason:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await server.stop(0)
    lines = [record.message for record in caplog.records if reason in record.message]
    assert len(lines) == 1
    assert f"127.0.0.1:{port}" in lines[0]
