import asyncio
import socket
import threading

import grpc
import pytest

from baton.core.errors import (
    BadPeerCard,
    DeadlineExceeded,
    IncompatiblePeer,
    InvalidRequest,
    PeerGone,
    WorkerLost,
)
from baton.rpc import channel
from baton.rpc.channel import grpc_status


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (WorkerLost("x"), grpc.StatusCode.UNAVAILABLE),
        (DeadlineExceeded("x"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (IncompatiblePeer("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (BadPeerCard("x"), grpc.StatusCode.UNAUTHENTICATED),
        (PeerGone("x"), grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_error_has_its_status_and_message(error, code):
    assert grpc_status(error) == (code, "x")


def test_unexpected_error_is_internal_and_says_nothing():
    code, message = grpc_status(RuntimeError("/secret/path"))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in message


async def test_peer_that_stops_answering_ends_its_calls(monkeypatch):
    def tenth(name: str, value: int) -> tuple[str, int]:
        return name, value // 10 if name.endswith("_ms") else value

    monkeypatch.setattr(channel, "_OPTIONS", tuple(tenth(*option) for option in channel._OPTIONS))
    empty_settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    listener = socket.create_server(("127.0.0.1", 0))

    def greet_and_fall_silent() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(empty_settings)
            while connection.recv(4096):
                pass

    thread = threading.Thread(target=greet_and_fall_silent)
    thread.start()
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    async with channel.open_channel(address) as peer:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(peer.unary_unary("/a.B/C")(b""), 5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await asyncio.to_thread(thread.join, 5)
    listener.close()
