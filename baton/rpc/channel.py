"""gRPC channels and servers with the project's options, and errors as gRPC status.

Every channel has keep-alives, so a peer that hangs or a link that is cut ends its streams within
`KEEPALIVE_S + KEEPALIVE_TIMEOUT_S` even when no deadline is set on the call. With `tls` both ends
show a certificate of the deployment; without it all is plain text, meant for loopback.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import NoReturn, Protocol

import grpc

from baton.core.errors import (
    BadPeerCard,
    IncompatiblePeer,
    PeerGone,
    TransferError,
    public_message,
    wire_status,
)
from baton.core.tls import TlsFiles
from baton.rpc.tls import channel_credentials, channel_options, explain_unreachable

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
_CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),
    # Sessions pause by themselves before they try again. Releases differ in whether the pause of a
    # closed channel holds for the next one to the same address; the default would be a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_PEER_CODES: dict[type[TransferError], grpc.StatusCode] = {
    IncompatiblePeer: grpc.StatusCode.FAILED_PRECONDITION,
    BadPeerCard: grpc.StatusCode.UNAUTHENTICATED,
    PeerGone: grpc.StatusCode.UNAVAILABLE,
}
"""Statuses that only processes of the platform see; clients never meet these errors."""


class ServerSide(Protocol):
    """TLS of a server: towards the platform's own processes, or towards clients."""

    interceptors: tuple[grpc.aio.ServerInterceptor, ...]

    def credentials(self) -> grpc.ServerCredentials: ...


def open_channel(address: str, tls: TlsFiles | None = None) -> grpc.aio.Channel:
    """A channel to `address` (host:port) inside the platform; proxies of the host are ignored."""
    options = (*_OPTIONS, *_CLIENT_OPTIONS)
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(
        address, channel_credentials(tls), options=(*options, *channel_options(tls))
    )


async def unreachable_reason(
    error: grpc.aio.AioRpcError, address: str, tls: TlsFiles | None
) -> str:
    """Why a call on a channel of `open_channel` failed, in one line. Takes a second at most.

    A failed handshake looks like any broken connection to gRPC, so it is looked into here.
    """
    reason = f"{error.code().name}: {error.details()}"
    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        return reason
    explanation = await explain_unreachable(address, tls)
    return explanation or reason


def new_server(
    *,
    max_receive_bytes: int = MAX_MESSAGE_BYTES,
    tls: ServerSide | None = None,
    shares_port: bool = False,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> grpc.aio.Server:
    """A server with the project's limits. Its port is another process's as well only if both ask
    for it by `shares_port`. `interceptors` come after those of `tls`.

    Messages longer than `max_receive_bytes` end their call with RESOURCE_EXHAUSTED, unread. With
    `tls` the server listens by `listen` with the same.
    """
    options = dict(_OPTIONS)
    options["grpc.max_receive_message_length"] = max_receive_bytes
    options["grpc.so_reuseport"] = int(shares_port)
    first = () if tls is None else tls.interceptors
    return grpc.aio.server(options=tuple(options.items()), interceptors=(*first, *interceptors))


def listen(server: grpc.aio.Server, authority: str, tls: ServerSide | None = None) -> int:
    """Take `authority` (host:port) for `server`; returns the port, 0 when it cannot be had."""
    try:
        if tls is None:
            return int(server.add_insecure_port(authority))
        return int(server.add_secure_port(authority, tls.credentials()))
    except RuntimeError:
        return 0


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine reach a server on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
