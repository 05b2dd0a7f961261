"""Mutual TLS on gRPC: who gets through, and what both sides say when somebody does not."""

import asyncio
import contextlib
import logging
import shutil
import socket
import ssl
import threading

import grpc
import pytest

from baton.core.errors import ConfigError
from baton.core.tls import TlsConfig, TlsFiles, names_deployment, open_tls
from baton.rpc import tls as rpc_tls
from baton.rpc.channel import is_loopback, listen, new_server, open_channel, unreachable_reason
from baton.rpc.tls import HandshakeWatch, ServerTls
from certificates import make_certificates, reissue, tls_files, unchecked_tls_files

METHODS = ("/echo/unary", "/echo/unary_stream", "/echo/stream", "/echo/stream_generator")
CALL_TIMEOUT_S = 5


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("tls") / "theirs")


class Echo(grpc.GenericRpcHandler):
    """One method of each kind of function that services are written as."""

    def service(self, details):
        handlers = {
            "/echo/unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "/echo/unary_stream": grpc.unary_stream_rpc_method_handler(self.unary_stream),
            "/echo/stream": grpc.stream_stream_rpc_method_handler(self.stream),
            "/echo/stream_generator": grpc.stream_stream_rpc_method_handler(self.generator),
        }
        return handlers.get(details.method)

    async def unary(self, request, context):
        return request

    async def unary_stream(self, request, context):
        await context.write(request)

    async def stream(self, requests, context):
        async for request in requests:
            await context.write(request)

    async def generator(self, requests, context):
        async for request in requests:
            yield request


@contextlib.asynccontextmanager
async def serving(tls=None):
    """The address of a server that echoes."""
    server_tls = None if tls is None else ServerTls(tls)
    server = new_server(tls=server_tls)
    server.add_generic_rpc_handlers((Echo(),))
    port = listen(server, "127.0.0.1:0", server_tls)
    assert port
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def call(address, tls=None, method="/echo/unary"):
    async with open_channel(address, tls) as channel:
        if method == "/echo/unary":
            return await channel.unary_unary(method)(b"x", timeout=CALL_TIMEOUT_S)
        if method == "/echo/unary_stream":
            answers = channel.unary_stream(method)(b"x", timeout=CALL_TIMEOUT_S)
        else:
            return await _one_streamed(channel.stream_stream(method)(timeout=CALL_TIMEOUT_S))
        return b"".join([answer async for answer in answers])


async def _one_streamed(stream):
    """Says one message and reads the answer before it closes, as the project's own clients do."""
    await stream.write(b"x")
    answer = await stream.read()
    await stream.done_writing()
    return answer


async def refusal(address, tls=None):
    """What the client says of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(address, tls)
    async with asyncio.timeout(3):
        return await unreachable_reason(caught.value, address, tls)


@pytest.mark.parametrize("method", METHODS)
async def test_processes_of_one_deployment_talk(certificates, method):
    async with serving(tls_files(certificates)) as address:
        assert await call(address, tls_files(certificates, "router"), method) == b"x"


async def test_unknown_method_stays_unimplemented(certificates):
    async with (
        serving(tls_files(certificates)) as address,
        open_channel(address, tls_files(certificates)) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/echo/nothing")(b"", timeout=CALL_TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_server_of_another_ca_is_refused(certificates, foreign):
    async with serving(tls_files(foreign)) as address:
        reason = await refusal(address, tls_files(certificates))
    assert "its certificate was refused: it is not of the CA in tls.ca_file" in reason


async def test_client_of_another_ca_is_refused(certificates, foreign, tmp_path):
    # It trusts the server all the same.
    folder = shutil.copytree(foreign, tmp_path / "mixed")
    client = unchecked_tls_files(folder)
    shutil.copy(certificates / "ca.pem", folder / "ca.pem")
    client = unchecked_tls_files(folder)
    async with serving(tls_files(certificates)) as address:
        reason = await refusal(address, client)
    assert "it refused our certificate; is it of the CA in the tls.ca_file there?" in reason


async def test_expired_server_certificate_is_refused(certificates, tmp_path):
    folder = shutil.copytree(certificates, tmp_path / "old")
    reissue(folder, "worker", shift_days=-20)
    async with serving(unchecked_tls_files(folder)) as address:
        reason = await refusal(address, tls_files(certificates))
    assert "its certificate was refused: it has expired; issue a new one" in reason


async def test_expired_client_certificate_is_refused(certificates, tmp_path):
    folder = shutil.copytree(certificates, tmp_path / "old")
    reissue(folder, "worker", shift_days=-20)
    async with serving(tls_files(certificates)) as address:
        reason = await refusal(address, unchecked_tls_files(folder, expires_in_s=-1))
    assert "it refused our certificate, which has expired; issue a new one" in reason


async def test_server_without_the_deployments_name_is_refused(certificates, tmp_path):
    folder = shutil.copytree(certificates, tmp_path / "other")
    reissue(folder, "worker", "staging")
    async with serving(unchecked_tls_files(folder, name="staging")) as address:
        reason = await refusal(address, tls_files(certificates))
    assert "it does not carry the DNS name 'baton'" in reason


async def test_client_without_the_deployments_name_is_refused(certificates, tmp_path, caplog):
    folder = shutil.copytree(certificates, tmp_path / "other")
    reissue(folder, "router", "staging")
    client = unchecked_tls_files(folder, "router")
    async with serving(tls_files(certificates)) as address:
        for method in METHODS:
            with caplog.at_level(logging.WARNING), pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(address, client, method)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "does not carry the DNS name 'baton'" in caught.value.details()
    assert "a call was refused" in caplog.text


@pytest.mark.parametrize("method", METHODS[2:])
async def test_refused_client_that_writes_late_learns_why(certificates, tmp_path, method):
    folder = shutil.copytree(certificates, tmp_path / "other")
    reissue(folder, "router", "staging")
    client = unchecked_tls_files(folder, "router")
    async with (
        serving(tls_files(certificates)) as address,
        open_channel(address, client) as channel,
    ):
        stream = channel.stream_stream(method)(timeout=CALL_TIMEOUT_S)
        await stream.wait_for_connection()
        await asyncio.sleep(0.1)  # a server that refuses at once has done so
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.write(b"x")
            await stream.read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_refused_client_that_never_writes_is_let_go(certificates, tmp_path, monkeypatch):
    monkeypatch.setattr(rpc_tls, "FIRST_MESSAGE_S", 0.05)
    folder = shutil.copytree(certificates, tmp_path / "other")
    reissue(folder, "router", "staging")
    client = unchecked_tls_files(folder, "router")
    async with (
        serving(tls_files(certificates)) as address,
        open_channel(address, client) as channel,
    ):
        stream = channel.stream_stream("/echo/stream")(timeout=CALL_TIMEOUT_S)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_plain_client_learns_that_the_server_speaks_tls(certificates):
    async with serving(tls_files(certificates)) as address:
        reason = await refusal(address)
    assert "it speaks TLS and this process plain text; set tls.ca_file" in reason


async def test_tls_client_learns_that_the_server_speaks_plain_text(certificates):
    async with serving() as address:
        reason = await refusal(address, tls_files(certificates))
    assert "it speaks plain text and this process TLS" in reason


async def test_server_that_is_not_there_is_explained_by_grpc_alone(certificates):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    for tls in (None, tls_files(certificates)):
        assert (await refusal(address, tls)).startswith("UNAVAILABLE")


async def test_silent_server_does_not_hold_the_explanation_up(certificates):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        async with asyncio.timeout(3 * rpc_tls.EXPLAIN_TIMEOUT_S):
            assert await rpc_tls.explain_unreachable(address, tls_files(certificates)) == ""
            assert await rpc_tls.explain_unreachable(address, None) == ""


async def test_only_tls_1_2_and_newer_is_spoken(certificates):
    material = tls_files(certificates).current()

    def attempt(address, version):
        host, port = address.split(":")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=material.ca.decode())
        context.load_cert_chain(certificates / "worker.pem", certificates / "worker-key.pem")
        context.set_alpn_protocols(["h2"])
        with (
            pytest.warns(DeprecationWarning)
            if version < ssl.TLSVersion.TLSv1_2
            else (contextlib.nullcontext())
        ):
            context.minimum_version = context.maximum_version = version
        with (
            socket.create_connection((host, int(port)), timeout=5) as raw,
            context.wrap_socket(raw, server_hostname="baton") as secure,
        ):
            return secure.version()

    async with serving(tls_files(certificates)) as address:
        assert await asyncio.to_thread(attempt, address, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises(OSError):
            await asyncio.to_thread(attempt, address, ssl.TLSVersion.TLSv1_1)


async def test_replaced_files_are_used_without_a_restart(certificates, foreign, tmp_path):
    folder = shutil.copytree(certificates, tmp_path / "live")
    server, client = tls_files(folder), tls_files(folder, "router")
    old_client = tls_files(certificates)
    async with serving(server) as address:
        assert await call(address, client) == b"x"
        for file in foreign.iterdir():
            shutil.copy(file, folder / file.name)
        assert await call(address, client) == b"x"
        assert "CA" in await refusal(address, old_client)


async def test_ca_is_replaced_by_trusting_both_for_a_while(certificates, foreign, tmp_path):
    old, new = (shutil.copytree(f, tmp_path / f.name) for f in (certificates, foreign))
    both = (old / "ca.pem").read_bytes() + (new / "ca.pem").read_bytes()
    for folder in (old, new):
        (folder / "ca.pem").write_bytes(both)
    async with serving(tls_files(old)) as address:
        assert await call(address, tls_files(new)) == b"x"
    async with serving(tls_files(new)) as address:
        assert await call(address, tls_files(old)) == b"x"


async def test_half_replaced_files_leave_the_old_ones_in_use(certificates, tmp_path, caplog):
    folder = shutil.copytree(certificates, tmp_path / "live")
    files = tls_files(folder)
    before = files.current()
    reissue(folder, "worker")
    good_key = (folder / "worker-key.pem").read_bytes()
    shutil.copy(folder / "router-key.pem", folder / "worker-key.pem")
    with caplog.at_level(logging.INFO):
        assert files.current() is before
        assert files.current() is before
    assert len([r for r in caplog.records if "in use stay" in r.message]) == 1
    (folder / "worker-key.pem").unlink()
    assert files.current() is before
    (folder / "worker-key.pem").write_bytes(good_key)
    assert files.current().cert != before.cert


def test_files_come_all_or_none():
    assert open_tls(TlsConfig()) is None
    with pytest.raises(ConfigError, match=r"tls\.key_file is not set.*or none of them"):
        TlsConfig(ca_file="ca.pem", cert_file="c.pem")
    with pytest.raises(ConfigError, match=r"tls\.name"):
        TlsConfig(name="Not A Name")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "ca.pem").unlink(), r"tls\.ca_file .*ca\.pem does not exist; `baton certs"),
        (lambda f: (f / "worker-key.pem").unlink(), r"tls\.key_file .* does not exist"),
        (lambda f: (f / "worker.pem").write_text("x"), r"tls\.cert_file .* hold no certificate"),
        (lambda f: (f / "ca.pem").write_text("x"), r"tls\.ca_file .* holds no certificate"),
        (lambda f: (f / "ca.pem").write_bytes(b"\xff\x00"), r"tls\.ca_file .* no certificate"),
        (lambda f: (f / "worker.pem").write_bytes(bytes(2 << 20)), "more than 1048576 bytes"),
        (lambda f: shutil.copy(f / "router-key.pem", f / "worker-key.pem"), "is not the key of"),
        (lambda f: reissue(f, "worker", shift_days=-20), "refused by peers: it has expired"),
        (lambda f: reissue(f, "worker", shift_days=5), "it is not valid yet; check the clocks"),
        (lambda f: reissue(f, "worker", "staging"), "does not carry the DNS name 'baton'"),
        (lambda f: make_another_ca(f), "it is not of the CA in tls.ca_file"),
        (lambda f: encrypt(f / "worker-key.pem"), "is encrypted; give an unencrypted key"),
        (lambda f: make_directory(f / "worker.pem"), "cannot be read"),
    ],
    ids=["no ca", "no key", "bad cert", "bad ca", "binary ca", "huge", "other key", "expired",
         "early", "other name", "other ca", "encrypted", "directory"],
)  # fmt: skip
def test_files_that_do_not_work_are_named_with_the_fix(certificates, tmp_path, spoil, message):
    folder = shutil.copytree(certificates, tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        tls_files(folder)


def test_key_that_others_can_read_is_warned_of(certificates, tmp_path, caplog):
    folder = shutil.copytree(certificates, tmp_path / "open")
    (folder / "worker-key.pem").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        tls_files(folder)
    assert "every user can read it" in caplog.text


def test_certificate_that_ends_soon_is_warned_of_once_a_day(certificates, tmp_path, caplog):
    folder = shutil.copytree(certificates, tmp_path / "short")
    reissue(folder, "worker")
    with caplog.at_level(logging.WARNING):
        files = tls_files(folder)
        files.current()
    assert [r.message.partition("worker.pem ")[2][:20] for r in caplog.records] == [
        "expires in 1.0 days;"
    ]


def test_many_threads_may_ask_at_once(certificates):
    files = tls_files(certificates)
    found = []
    threads = [
        threading.Thread(target=lambda: found.extend(files.current() for _ in range(50)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 400 and all(m is found[0] for m in found)


def test_contexts_for_sockets_check_both_ends(certificates, foreign):
    def handshake(server, client, name="baton"):
        a, b = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [
            client.client_context.wrap_bio(b, a, server_hostname=name),
            server.server_context.wrap_bio(a, b, server_side=True),
        ]
        for _ in range(4):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        return ends[1].getpeercert()

    ours, theirs = tls_files(certificates).current(), tls_files(foreign).current()
    certificate = handshake(ours, ours)
    assert names_deployment(certificate, "baton")
    assert not names_deployment(certificate, "staging")
    assert not names_deployment(None, "baton")
    for server, client in ((ours, theirs), (theirs, ours)):
        with pytest.raises(ssl.SSLError):
            handshake(server, client)


def test_connections_without_a_call_are_counted_and_logged_now_and_then(caplog):
    now_s = 0.0
    failed: list[None] = []
    watch = HandshakeWatch(lambda: now_s, on_failed=lambda: failed.append(None))
    with caplog.at_level(logging.WARNING):
        for second in range(100):
            now_s = float(second)
            watch.connection_accepted()
            if second % 2:
                watch.call_arrived(f"ipv4:10.0.0.1:{second}")
                watch.call_arrived(f"ipv4:10.0.0.1:{second}")
    assert 44 <= watch.num_failed == len(failed) <= 50
    assert 3 <= len(caplog.records) <= 4
    assert "ended without a call" in caplog.text


async def test_server_logs_that_connections_fail(certificates, foreign, caplog, monkeypatch):
    monkeypatch.setattr(rpc_tls, "SILENT_AFTER_S", 0.1)
    client = tls_files(foreign)
    async with serving(tls_files(certificates)) as address:
        with caplog.at_level(logging.WARNING):
            await refusal(address, client)
            await asyncio.sleep(0.15)
            await refusal(address, client)
    assert "ended without a call" in caplog.text


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("gpu-7", False)],
)
def test_loopback_is_recognised(host, is_local):
    assert is_loopback(host) is is_local


def make_another_ca(folder):
    other = make_certificates(folder / "another")
    shutil.copy(other / "ca.pem", folder / "ca.pem")


def make_directory(path):
    path.unlink()
    path.mkdir()


def encrypt(path):
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    key = load_pem_private_key(path.read_bytes(), password=None)
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )


def test_tls_that_is_off_has_no_files():
    with pytest.raises(ConfigError, match="are not set"):
        TlsFiles(TlsConfig())
