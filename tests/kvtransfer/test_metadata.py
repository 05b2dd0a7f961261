"""Peer cards: what is accepted, what is refused, and in which order."""

from __future__ import annotations

import dataclasses
import json

import pytest

from baton.core.errors import BadPeerCard, IncompatiblePeer
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.metadata import (
    CANARY_BYTES,
    MAX_CARD_BYTES,
    NixlEndpoint,
    PeerCard,
    ShmEndpoint,
    check_compatible,
    open_card,
    seal_card,
)

SECRET = b"secret"
NOW_S = 1_700_000_000.0
LAYOUT = KvLayout("model-a", 30, 3, 64, 16, "bfloat16")


def make_card(**changes: object) -> PeerCard:
    card = PeerCard(
        worker_id=WorkerId("prefill-0"),
        epoch=Epoch("e1"),
        transport="nixl",
        layout=LAYOUT,
        num_blocks=64,
        host_id="host",
        pid_namespace="pid:[1]",
        pid=42,
        canary_address=2**47 - 1,
        canary=bytes(range(CANARY_BYTES)),
        endpoint=NixlEndpoint("prefill-0:e1:1", b"\x00blob\xff", 2**46, 0),
        issued_at_s=NOW_S,
        expires_at_s=NOW_S + 60,
    )
    return dataclasses.replace(card, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "endpoint",
    [
        NixlEndpoint("a", b"\x00\xff" * 100, 1, 0),
        ShmEndpoint("/proc/1/fd/2", 4096, 0),
        None,
    ],
)
def test_card_survives_the_wire(endpoint):
    card = make_card(endpoint=endpoint)
    assert open_card(seal_card(card, SECRET), SECRET, now_s=NOW_S) == card


def test_every_forged_bit_is_refused():
    wire = bytearray(seal_card(make_card(), SECRET))
    for position in range(0, len(wire), 7):
        wire[position] ^= 1
        with pytest.raises(BadPeerCard, match="signature"):
            open_card(bytes(wire), SECRET, now_s=NOW_S)
        wire[position] ^= 1


def test_another_secret_is_refused():
    wire = seal_card(make_card(), b"other")
    with pytest.raises(BadPeerCard, match="one secret"):
        open_card(wire, SECRET, now_s=NOW_S)


@pytest.mark.parametrize("length", [0, 1, 32, 33, 200, -1])
def test_truncated_card_is_refused(length):
    wire = seal_card(make_card(), SECRET)
    with pytest.raises(BadPeerCard):
        open_card(wire[:length], SECRET, now_s=NOW_S)


def test_oversized_card_is_refused_unread_and_not_made():
    with pytest.raises(BadPeerCard, match=str(MAX_CARD_BYTES)):
        open_card(bytes(MAX_CARD_BYTES + 1), SECRET, now_s=NOW_S)
    huge = make_card(endpoint=NixlEndpoint("a", bytes(MAX_CARD_BYTES), 1, 0))
    with pytest.raises(BadPeerCard, match="own card"):
        seal_card(huge, SECRET)


def test_expired_card_is_refused():
    wire = seal_card(make_card(), SECRET)
    with pytest.raises(BadPeerCard, match="expired 1 s ago"):
        open_card(wire, SECRET, now_s=NOW_S + 61)


def test_other_protocol_version_is_refused_before_the_rest_is_read():
    wire = seal_card(make_card(protocol_version=99, canary=b"short"), SECRET)
    with pytest.raises(IncompatiblePeer, match="protocol version: 1 here, 99 there"):
        open_card(wire, SECRET, now_s=NOW_S)


@pytest.mark.parametrize(
    "changes",
    [
        {"canary": b"short"},
        {"num_blocks": 0},
        {"pid": -1},
        {"num_blocks": "many"},
        {"host_id": 7},
        {"layout": {"model_id": "x"}},
    ],
)
def test_signed_nonsense_is_malformed_not_a_crash(changes, monkeypatch):
    plain = json.loads(seal_card(make_card(), SECRET)[32:])
    plain.update({k: v.hex() if isinstance(v, bytes) else v for k, v in changes.items()})
    monkeypatch.setattr("kvtransfer.metadata._plain", lambda card: plain)
    with pytest.raises(BadPeerCard, match="malformed"):
        open_card(seal_card(make_card(), SECRET), SECRET, now_s=NOW_S)


@pytest.mark.parametrize("payload", [b"[]", b"null", b"{}", b"\xff", b"{"])
def test_signed_other_json_is_malformed(payload):
    from kvtransfer.metadata import _sign

    with pytest.raises(BadPeerCard, match="malformed"):
        open_card(_sign(payload, SECRET) + payload, SECRET, now_s=NOW_S)


def test_layout_mismatch_names_every_difference():
    other = dataclasses.replace(LAYOUT, num_layers=16, dtype="float32")
    with pytest.raises(IncompatiblePeer) as caught:
        check_compatible(make_card(layout=other), layout=LAYOUT, transport="nixl")
    assert "num_layers: 30 here, 16 there" in str(caught.value)
    assert "dtype: bfloat16 here, float32 there" in str(caught.value)
    assert "head_dim" not in str(caught.value)


def test_transport_mismatch_names_the_fix():
    with pytest.raises(IncompatiblePeer, match="shm here, nixl at prefill-0; set the same"):
        check_compatible(make_card(), layout=LAYOUT, transport="shm")
