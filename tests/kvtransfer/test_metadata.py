"""Peer cards: what is accepted, what is refused, and in which order."""

from __future__ import annotations

import dataclasses
import json

import pytest

from baton.core.errors import BadPeerCard, IncompatiblePeer
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import PROTOCOL_VERSION, Epoch, WorkerId
from kvtransfer.metadata import (
    CANARY_BYTES,
    MAX_CARD_BYTES,
    NixlEndpoint,
    PeerCard,
    ShmEndpoint,
    SocketEndpoint,
    check_compatible,
    open_card,
    seal_card,
)

SECRET = b"secret"
NOW_S = 1_700_000_000.0
NONCE = bytes(range(16))
LAYOUT = KvLayout("model-a", 30, 3, 64, 16, "bfloat16")
CANARY = bytes(range(CANARY_BYTES))
NIXL = NixlEndpoint("prefill-0:e1:1", b"\x00blob\xff", 2**46, 0, "DRAM", 2**47 - 1, CANARY)
SHM = ShmEndpoint("/proc/1/fd/2", 4096, 0, 4064, CANARY)
SOCKET = SocketEndpoint("10.0.0.7", 4711, False)


def make_card(**changes: object) -> PeerCard:
    card = PeerCard(
        worker_id=WorkerId("prefill-0"),
        epoch=Epoch("e1"),
        layout=LAYOUT,
        num_blocks=64,
        num_scratch_blocks=2,
        tp_rank=0,
        tp_size=1,
        host_id="host",
        pid_namespace="pid:[1]",
        pid=42,
        endpoints=(NIXL, SHM, SOCKET),
        nonce=NONCE,
        issued_at_s=NOW_S,
        expires_at_s=NOW_S + 60,
    )
    return dataclasses.replace(card, **changes)  # type: ignore[arg-type]


def opened(wire: bytes, *, secret: bytes = SECRET, now_s: float = NOW_S) -> PeerCard:
    return open_card(wire, secret, now_s=now_s, nonce=NONCE)


@pytest.mark.parametrize("endpoints", [(), (NIXL,), (SOCKET, SHM), (NIXL, SHM, SOCKET)])
def test_card_survives_the_wire(endpoints):
    card = make_card(endpoints=endpoints)
    assert opened(seal_card(card, SECRET)) == card
    assert card.endpoint(ShmEndpoint) is (SHM if SHM in endpoints else None)


def test_card_for_another_connection_is_refused():
    wire = seal_card(make_card(), SECRET)
    for nonce in (b"", NONCE[:-1], bytes(16)):
        with pytest.raises(BadPeerCard, match="replayed or made for another connection"):
            open_card(wire, SECRET, now_s=NOW_S, nonce=nonce)
    for nonce in (b"", b"short", bytes(65)):
        with pytest.raises(BadPeerCard, match="nonce has"):
            seal_card(make_card(nonce=nonce), SECRET)


def test_every_forged_bit_is_refused():
    wire = bytearray(seal_card(make_card(), SECRET))
    for position in range(0, len(wire), 7):
        wire[position] ^= 1
        with pytest.raises(BadPeerCard, match="signature"):
            opened(bytes(wire))
        wire[position] ^= 1


def test_another_secret_is_refused():
    wire = seal_card(make_card(), b"other")
    with pytest.raises(BadPeerCard, match="one secret"):
        opened(wire)


@pytest.mark.parametrize("length", [0, 1, 32, 33, 200, -1])
def test_truncated_card_is_refused(length):
    wire = seal_card(make_card(), SECRET)
    with pytest.raises(BadPeerCard):
        opened(wire[:length])


def test_oversized_card_is_refused_unread_and_not_made():
    with pytest.raises(BadPeerCard, match=str(MAX_CARD_BYTES)):
        opened(bytes(MAX_CARD_BYTES + 1))
    huge = make_card(endpoints=(dataclasses.replace(NIXL, agent_blob=bytes(MAX_CARD_BYTES)),))
    with pytest.raises(BadPeerCard, match="own card"):
        seal_card(huge, SECRET)


def test_expired_card_is_refused():
    wire = seal_card(make_card(), SECRET)
    with pytest.raises(BadPeerCard, match="expired 1 s ago"):
        opened(wire, now_s=NOW_S + 61)


def test_other_protocol_version_is_refused_before_the_rest_is_read():
    wire = seal_card(make_card(protocol_version=99, num_blocks=0), SECRET)
    with pytest.raises(
        IncompatiblePeer, match=f"protocol version: {PROTOCOL_VERSION} here, 99 there"
    ):
        opened(wire)


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": 7},
        {"num_blocks": 0},
        {"num_blocks": 2},
        {"num_scratch_blocks": -1},
        {"tp_rank": 1},
        {"tp_size": 2},
        {"endpoints": None},
        {"endpoints": [{"transport": "pigeon"}]},
        {"endpoints": [{"transport": "socket", "host": "h", "port": "1", "uses_tls": False}]},
        {"endpoints": [{"transport": "socket", "host": "h", "port": 1, "uses_tls": 0}]},
        {"endpoints": [{"transport": "shm", "path": "p"}]},
        {"expires_at_s": "soon"},
        {"pid": -1},
        {"num_blocks": "many"},
        {"host_id": 7},
        {"layout": {"model_id": "x"}},
    ],
)
def test_signed_nonsense_is_malformed_not_a_crash(changes, monkeypatch):
    plain = json.loads(seal_card(make_card(), SECRET)[32:])
    plain.update(changes)
    monkeypatch.setattr("kvtransfer.metadata._plain", lambda card: plain)
    with pytest.raises(BadPeerCard, match="malformed"):
        opened(seal_card(make_card(), SECRET))


@pytest.mark.parametrize("payload", [b"[]", b"null", b"{}", b"\xff", b"{"])
def test_signed_other_json_is_malformed(payload):
    from kvtransfer.metadata import _sign

    with pytest.raises(BadPeerCard, match="malformed"):
        opened(_sign(payload, SECRET) + payload)


def test_layout_mismatch_names_every_difference():
    other = dataclasses.replace(LAYOUT, num_layers=16, dtype="float32")
    with pytest.raises(IncompatiblePeer) as caught:
        check_compatible(make_card(layout=other), layout=LAYOUT)
    assert "num_layers: 30 here, 16 there" in str(caught.value)
    assert "dtype: bfloat16 here, float32 there" in str(caught.value)
    assert "head_dim" not in str(caught.value)


@pytest.mark.parametrize(("there", "fits"), [(16, True), (64, True), (4, True), (24, False)])
def test_block_sizes_fit_when_one_divides_the_other(there, fits):
    card = make_card(layout=dataclasses.replace(LAYOUT, block_size=there))
    if fits:
        check_compatible(card, layout=LAYOUT)
        return
    with pytest.raises(IncompatiblePeer, match="block_size: 16 here, 24 there; take equal ones"):
        check_compatible(card, layout=LAYOUT)
