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
