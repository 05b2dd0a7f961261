"""Socket transport under mutual TLS: bytes as ever, readable reasons where certificates differ."""

from __future__ import annotations

import logging
import shutil
import socket
import ssl
import time

import numpy as np
import pytest

from baton.cli.certs import tls_config
from baton.core.errors import IncompatiblePeer, PeerGone
from baton.core.tls import TlsFiles
from baton.core.worker_info import Epoch, WorkerId
from certificates import make_certificates, reissue, unchecked_tls_files
from kvtransfer.metadata import PeerIdentity
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.socket_link import SocketConfig, SocketLink

SECRET = b"secret"
NONCE = b"nonce of the test"
NUM_BLOCKS = 64


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> TlsFiles:
    folder = make_certificates(tmp_path_factory.mktemp("tls") / "ours")
    return TlsFiles(tls_config(folder, "worker"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> TlsFiles:
    folder = make_certificates(tmp_path_factory.mktemp("tls") / "theirs")
    return TlsFiles(tls_config(folder, "worker"))


@pytest.fixture(scope="module")
def misnamed(tmp_path_factory, ours) -> TlsFiles:
    """A certificate of our CA that carries the name of another deployment."""
    folder = tmp_path_factory.mktemp("tls") / "misnamed"
    shutil.copytree(ours.config.ca_file.parent, folder)
    reissue(folder, "worker", "other")
    return unchecked_tls_files(folder)


@pytest.fixture
async def open_worker(make_pool):
    opened: list[MoverTransport] = []

    def make(name: str, tls: TlsFiles | None):
        pool = make_pool("socket", NUM_BLOCKS)
        identity = PeerIdentity(WorkerId(name), Epoch("e1"))
        link = SocketLink(pool.region, identity, SECRET, config=SocketConfig(tls=tls))
        transport = MoverTransport(
            links=[link], region=pool.region, identity=identity, secret=SECRET
        )
        opened.append(transport)
        return transport, pool

    yield make
    for transport in opened:
        await transport.close()


async def test_blocks_are_read_right_under_tls(open_worker, ours):
    reader, pool = open_worker("decode-0", ours)
    owner, source = open_worker("prefill-0", ours)
    source.words[:] = (np.arange(NUM_BLOCKS, dtype=np.uint32) + 1000)[:, None]
    peer, _ = await reader.connect(owner.card(NONCE), nonce=NONCE)
    remote = list(range(0, 64, 3)) + list(range(1, 64, 3))
    local = remote[::-1]
    stats = await reader.read(peer, remote, local, timeout_s=10)
    assert pool.holds(local, remote, 1000)
    assert stats.num_bytes == len(remote) * pool.region.layout.block_bytes
    assert reader.link(peer).lane == "tls"


async def test_certificate_of_another_deployment_is_refused_with_its_reason(
    open_worker, ours, foreign
):
    reader, _ = open_worker("decode-0", ours)
    owner, _ = open_worker("prefill-0", foreign)
    with pytest.raises(PeerGone, match=r"TLS handshake failed: .*(self-signed|issuer)"):
        await reader.connect(owner.card(NONCE), nonce=NONCE)


async def test_certificate_of_another_name_is_refused_on_both_sides(
    open_worker, ours, misnamed, caplog
):
    caplog.set_level(logging.INFO)
    good, _ = open_worker("decode-0", ours)
    bad, _ = open_worker("prefill-0", misnamed)
    with pytest.raises(PeerGone, match="TLS handshake failed: Hostname mismatch"):
        await good.connect(bad.card(NONCE), nonce=NONCE)
    with pytest.raises(PeerGone, match="socket"):
        await bad.connect(good.card(NONCE), nonce=NONCE)
    assert "its certificate does not carry the DNS name 'baton'" in caplog.text


async def test_one_side_without_tls_names_the_setting(open_worker, ours):
    plain, _ = open_worker("decode-0", None)
    owner, _ = open_worker("prefill-0", ours)
    with pytest.raises(IncompatiblePeer, match="without TLS here, with it at prefill-0; set the"):
        await plain.connect(owner.card(NONCE), nonce=NONCE)
    with pytest.raises(IncompatiblePeer, match="with TLS here, without it at decode-0"):
        await owner.connect(plain.card(NONCE), nonce=NONCE)


async def test_strangers_without_a_certificate_get_nothing(open_worker, ours):
    owner, _ = open_worker("prefill-0", ours)
    port = owner._links.links[0].endpoint.port
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
        plain.sendall(b"\x01\x01\0\0\0\0\0\0" * 100)
        with pytest.raises((ConnectionError, EOFError)):
            while True:
                if not plain.recv(1000):
                    raise EOFError
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        anonymous = context.wrap_socket(raw)
        with pytest.raises(OSError):
            anonymous.sendall(b"x" * 100)
            anonymous.recv(100)
            time.sleep(0.1)
            anonymous.recv(100)
        anonymous.close()
