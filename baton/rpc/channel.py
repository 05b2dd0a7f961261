"""gRPC channels and servers with the project's options, and errors as gRPC status.

Every channel has keep-alives, so a peer that hangs or a link that is cut ends its streams within
`KEEPALIVE_S + KEEPALIVE_TIMEOUT_S` even when no deadline is set on the call.
"""

from __future__ import annotations

from typing import NoReturn

import grpc

from baton.core.errors import (
    BadPeerCard,
    IncompatiblePeer,
    PeerGone,
    TransferError,
    public_message,
    wire_status,
)

KEEPALIVE_S = 10
KEEPALIVE_TIMEOUT_S = 5
MAX_MESSAGE_BYTES = 64 << 20
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    # gRPC core sends keep-alives but waits for the answer by this setting alone, a minute if unset.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 2000),
    ("grpc.http2.min_ping_interval_without_data_ms", 2000),
)

_PEER_CODES: dict[type[TransferError], grpc.StatusCode] = {
    IncompatiblePeer: grpc.StatusCode.FAILED_PRECONDITION,
    BadPeerCard: grpc.StatusCode.UNAUTHENTICATED,
    PeerGone: grpc.StatusCode.UNAVAILABLE,
}
"""Statuses that only processes of the platform see; clients never meet these errors."""


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to `address` (host:port) inside the platform; proxies of the host are ignored."""
    options = (*_OPTIONS, ("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", 2000))
    return grpc.aio.insecure_channel(address, options=options)


def new_server(*, max_receive_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Server:
    """A server with the project's limits; ports are never shared with another process.

    Messages longer than `max_receive_bytes` end their call with RESOURCE_EXHAUSTED, unread.
    """
    options = dict(_OPTIONS)
    options["grpc.max_receive_message_length"] = max_receive_bytes
    options["grpc.so_reuseport"] = 0
    return grpc.aio.server(options=tuple(options.items()))


def grpc_status(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The canonical code and the public message of `error`."""
    for cls, code in _PEER_CODES.items():
        if isinstance(error, cls):
            return code, public_message(error)
    return getattr(grpc.StatusCode, wire_status(error).grpc), public_message(error)


async def abort(context: grpc.aio.ServicerContext, error: BaseException) -> NoReturn:
    """End the call with the status of `error`."""
    code, message = grpc_status(error)
    await context.abort(code, message)
    raise AssertionError("abort() does not return")
