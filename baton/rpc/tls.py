"""TLS of gRPC connections: credentials, the name on a client's certificate, and why a connection
did not come about.

gRPC checks that a client's certificate is of the right CA; that it carries the deployment's name
is checked here, once per call. A handshake that fails is visible to neither side's code: the
client gets a broken connection, the server nothing. The client therefore looks itself what the
other side speaks (`explain_unreachable`), and the server counts connections that never made a call
(`HandshakeWatch`).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from baton.core.tls import TlsFiles, TlsMaterial, verification_reason

logger = logging.getLogger(__name__)

EXPLAIN_TIMEOUT_S = 1.0
GREETING_WAIT_S = 0.3
"""After our part of the handshake the server still has to accept our certificate."""
SILENT_AFTER_S = 3.0
FIRST_MESSAGE_S = 2.0
"""How long the refusal of a streaming call waits for the client's first message."""
WARNING_PERIOD_S = 30.0
MAX_WATCHED = 4096
_SAN = "x509_subject_alternative_name"
_Refusal = Callable[[grpc.aio.ServicerContext, AsyncIterator[Any] | None], Awaitable[None]]


def channel_credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    """Of the files as they are now; a new channel is opened for every reconnect."""
    now = tls.current()
    return grpc.ssl_channel_credentials(now.ca, now.key, now.cert)


def channel_options(tls: TlsFiles) -> tuple[tuple[str, str], ...]:
    """The server's certificate must name the deployment, not the address we dial."""
    return (("grpc.ssl_target_name_override", tls.name),)


class ServerTls:
    """Credentials and call checks of one server; files are looked at before every handshake."""

    def __init__(self, tls: TlsFiles) -> None:
        self._tls = tls
        self._material: TlsMaterial | None = None
        self._watch = HandshakeWatch()
        self.interceptors = (CallCheck(tls.name, self._watch),)

    def credentials(self) -> grpc.ServerCredentials:
        self._material = self._tls.current()
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._material), self._on_handshake, require_client_authentication=True
        )

    def _on_handshake(self) -> grpc.ServerCertificateConfiguration | None:
        """On a thread of gRPC; None keeps what is in use."""
        self._watch.connection_accepted()
        material = self._tls.current()
        if material is self._material:
            return None
        self._material = material
        return _configuration(material)


class HandshakeWatch:
    """Connections accepted against connections that made a call."""

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        on_failed: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_failed` is told of each, on a thread of gRPC, never on two at a time."""
        self._now = now
        self._on_failed = on_failed
        self._lock = threading.Lock()
        self._waiting: deque[float] = deque(maxlen=MAX_WATCHED)
        self._seen: dict[str, None] = {}
        self._warned_at_s = -WARNING_PERIOD_S
        self.num_failed = 0
        """Connections that ended in the handshake, or never made a call."""

    def connection_accepted(self) -> None:
        """Before the handshake. Logs, at most twice a minute, those before that came to nothing."""
        with self._lock:
            now_s = self._now()
            while self._waiting and now_s - self._waiting[0] > SILENT_AFTER_S:
                self._waiting.popleft()
                self.num_failed += 1
                self._on_failed()
            self._waiting.append(now_s)
            if not self.num_failed or now_s - self._warned_at_s < WARNING_PERIOD_S:
                return
            self._warned_at_s = now_s
            num_failed = self.num_failed
        logger.warning(
            "%d connections so far ended without a call: the other side has no certificate, one "
            "that has expired or is of another CA, or speaks plain text; its log says which",
            num_failed,
        )

    def call_arrived(self, peer: str) -> None:
        """`peer`: address and port, which are those of one connection."""
        with self._lock:
            if peer in self._seen:
                return
            self._seen[peer] = None
            if len(self._seen) > MAX_WATCHED:
                del self._seen[next(iter(self._seen))]
            if self._waiting:
                self._waiting.popleft()


class CallCheck(grpc.aio.ServerInterceptor):
    """Tells the watch of calls, and refuses those under a certificate without `name`, if given."""

    def __init__(self, name: str | None, watch: HandshakeWatch) -> None:
        self._name = name
        self._watch = watch

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        return None if handler is None else _checked(handler, self._check)

    async def _check(
        self, context: grpc.aio.ServicerContext, messages: AsyncIterator[Any] | None
    ) -> None:
        """`messages`: what the client streams, if it does."""
        self._watch.call_arrived(context.peer())
        if self._name is None:
            return
        names = context.auth_context().get(_SAN, ())
        if self._name.encode() not in names:
            reason = (
                f"the certificate shown does not carry the DNS name {self._name!r}; "
                "is it of another deployment under the same CA?"
            )
            logger.warning("a call was refused: %s", reason)
            if messages is not None:
                await _take_one(messages)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)


async def _take_one(messages: AsyncIterator[Any]) -> None:
    """Waits for the client's first message: gRPC tells a client that still writes when its call
    ends of an internal error, instead of the status."""
    with contextlib.suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(FIRST_MESSAGE_S):
            await anext(messages)


def _checked(handler: grpc.RpcMethodHandler, check: _Refusal) -> grpc.RpcMethodHandler:
    """`handler` behind `check`; its kind of function stays, since gRPC calls it by its kind."""
    kinds: dict[tuple[bool, bool], tuple[Any, Callable[..., grpc.RpcMethodHandler]]] = {
        (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
        (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
        (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
        (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
    }
    function, remake = kinds[handler.request_streaming, handler.response_streaming]

    def streamed(request: Any) -> AsyncIterator[Any] | None:
        return aiter(request) if handler.request_streaming else None

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await check(context, streamed(request))
        return await function(request, context)

    async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await check(context, streamed(request))
        async for message in function(request, context):
            yield message

    wrapped = stream if inspect.isasyncgenfunction(function) else call
    return remake(wrapped, handler.request_deserializer, handler.response_serializer)


def _configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.cert)], root_certificates=material.ca
    )


async def explain_unreachable(address: str, tls: TlsFiles | None) -> str:
    """What TLS has to do with it that `address` cannot be reached; empty when nothing.

    Makes a connection of its own; answers within EXPLAIN_TIMEOUT_S.
    """
    host, _, port = address.rpartition(":")
    where = (host.strip("[]"), int(port))
    if tls is None:
        return await asyncio.to_thread(_speaks_tls, where)
    return await asyncio.to_thread(_why_refused, where, tls)


def _speaks_tls(where: tuple[str, int]) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(where, timeout=EXPLAIN_TIMEOUT_S / 2) as raw,
            context.wrap_socket(raw),
        ):
            return "it speaks TLS and this process plain text; set tls.ca_file, cert_file, key_file"
    except OSError:
        return ""


def _why_refused(where: tuple[str, int], tls: TlsFiles) -> str:
    has_shaken_hands = False
    try:
        context = _probe_context(tls)
        with (
            socket.create_connection(where, timeout=EXPLAIN_TIMEOUT_S / 2) as raw,
            context.wrap_socket(raw, server_hostname=tls.name) as secure,
        ):
            has_shaken_hands = True
            secure.settimeout(GREETING_WAIT_S)
            # A gRPC server that has accepted our certificate speaks first.
            return "" if secure.recv(1) else _refused_by_server(tls)
    except ssl.SSLCertVerificationError as error:
        return f"its certificate was refused: {verification_reason(error, tls.name)}"
    except ssl.SSLError as error:
        return _protocol_reason(error, tls)
    except ConnectionError:
        return _refused_by_server(tls) if has_shaken_hands else ""
    except OSError:
        return ""


def _probe_context(tls: TlsFiles) -> ssl.SSLContext:
    """Like gRPC's, which speaks h2 only. The shared context must not be changed."""
    assert tls.config.cert_file is not None and tls.config.key_file is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=tls.current().ca.decode("ascii"))
    context.load_cert_chain(tls.config.cert_file, tls.config.key_file)
    context.set_alpn_protocols(["h2"])
    return context


def _protocol_reason(error: ssl.SSLError, tls: TlsFiles) -> str:
    reason = error.reason or str(error)
    if "WRONG_VERSION_NUMBER" in reason or "HTTP_REQUEST" in reason:
        return "it speaks plain text and this process TLS; give it tls.ca_file, cert_file, key_file"
    return _refused_by_server(tls) if "ALERT" in reason else f"TLS failed ({reason})"


def _refused_by_server(tls: TlsFiles) -> str:
    """gRPC servers close the connection without a word."""
    if tls.current().expires_at_s <= time.time():
        return "it refused our certificate, which has expired; issue a new one"
    return "it refused our certificate; is it of the CA in the tls.ca_file there?"
