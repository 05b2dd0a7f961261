"""Triton's own client speaks to the Open Inference Protocol of the router."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from baton.rpc.v1 import open_inference_pb2 as pb
from baton.telemetry.metrics import Metrics
from services.router.edge.grpc_server import GrpcServer

pytest.importorskip("tritonclient", reason="comes with the test extra")

CHILD = Path(__file__).parents[3] / "support/triton_child.py"
TIMEOUT_S = 60


@pytest.fixture
async def answer(generator, edge_config):
    server = GrpcServer(generator, host="127.0.0.1", port=0, metrics=Metrics(), config=edge_config)
    await server.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(CHILD), f"127.0.0.1:{server.port}", "abc",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
        await server.stop()
    assert process.returncode == 0, errors.decode()
    return json.loads(output)


async def test_tritons_client_infers_streams_and_asks(answer):
    theirs = answer.pop("numbers")
    pieces = answer.pop("pieces")
    assert "".join(pieces) == "Hello, world" and len(pieces) == 12
    refusal = answer.pop("refusal")
    assert "INVALID_ARGUMENT" in refusal and "top_p" in refusal
    assert answer == {
        "live": True,
        "ready": True,
        "model_ready": True,
        "platform": "baton",
        "server": "baton",
        "text": "Hello, world",
        "finish_reason": "stop",
        "completion_tokens": 12,
    }
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        for part in (message, *message.nested_types):
            name = part.full_name.removeprefix("inference.")
            assert {f.name: f.number for f in part.fields} == theirs[name], name
