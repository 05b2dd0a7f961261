"""Workers under TLS: hand-offs as ever, and readable reasons where certificates differ."""

import logging

import grpc
import pytest

from baton.cli.certs import tls_config
from baton.core.errors import ConfigError
from baton.core.request import FinishReason, Work
from baton.core.tls import TlsConfig
from baton.core.worker_info import Role
from baton.rpc.channel import open_channel
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1.worker_pb2_grpc import WorkerStub
from certificates import make_certificates

PROMPT = [(i * 5) % 97 for i in range(30)]


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return tls_config(make_certificates(tmp_path_factory.mktemp("tls") / "ours"), "worker")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return tls_config(make_certificates(tmp_path_factory.mktemp("tls") / "theirs"), "worker")


async def handed_off(prefill, decode, make_request):
    """Tokens of both and the decode worker's last delta."""
    on_prefill, on_decode = await prefill.router(), await decode.router()
    await on_decode.submit(make_request("r", PROMPT, work=Work.DECODE, peer=prefill.peer))
    await on_prefill.submit(make_request("r", PROMPT, work=Work.PREFILL))
    end = await on_decode.ended("r")
    await on_prefill.ended("r")
    return on_prefill.tokens("r") + on_decode.tokens("r"), end


async def test_hand_off_under_tls(workers, make_request, expected, tls):
    prefill = await workers.start(Role.PREFILL, tls=tls)
    decode = await workers.start(Role.DECODE, tls=tls)
    tokens, end = await handed_off(prefill, decode, make_request)
    assert end.finish_reason is FinishReason.LENGTH
    assert tokens == expected(PROMPT, len(tokens))
    for worker in (prefill, decode):
        await worker.assert_nothing_leaked()


async def test_peer_of_another_ca_is_named_in_the_error(workers, make_request, tls, foreign):
    prefill = await workers.start(Role.PREFILL, tls=tls)
    decode = await workers.start(Role.DECODE, tls=foreign)
    _, end = await handed_off(prefill, decode, make_request)
    assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    assert "its certificate was refused: it is not of the CA in tls.ca_file" in end.error
    await decode.assert_nothing_leaked()


@pytest.mark.parametrize("is_reader_plain", [True, False])
async def test_peer_that_speaks_otherwise_is_named_in_the_error(
    workers, make_request, tls, is_reader_plain
):
    prefill = await workers.start(Role.PREFILL, tls=tls if is_reader_plain else None)
    decode = await workers.start(Role.DECODE, tls=None if is_reader_plain else tls)
    _, end = await handed_off(prefill, decode, make_request)
    assert end.finish_reason is FinishReason.ERROR
    speaks = "it speaks TLS" if is_reader_plain else "it speaks plain text"
    assert speaks in end.error
    await decode.assert_nothing_leaked()


async def test_plain_router_gets_nothing(workers, tls):
    worker = await workers.start(tls=tls)
    async with open_channel(worker.info.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await WorkerStub(channel).GetInfo(pb.GetInfoRequest(), timeout=5)


async def test_missing_files_end_the_start(workers, tmp_path):
    missing = TlsConfig(*(tmp_path / name for name in ("ca", "cert", "key")))
    with pytest.raises(ConfigError, match=r"tls\.ca_file .* does not exist"):
        await workers.start(tls=missing)


async def test_plain_worker_on_all_interfaces_is_warned_of(workers, caplog, monkeypatch):
    monkeypatch.setattr("services.worker.worker.is_loopback", lambda host: False)
    with caplog.at_level(logging.WARNING):
        await workers.start()
    assert "without TLS" in caplog.text
