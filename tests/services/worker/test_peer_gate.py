"""The door of the Transfer service: which cards open it, and how often."""

import asyncio
import dataclasses
import json
import logging

import pytest

from baton.core.clock import ManualClock
from baton.core.errors import BadPeerCard, IncompatiblePeer, Unavailable
from baton.core.kv_layout import KvLayout
from baton.core.request import PeerRef
from baton.core.worker_info import Epoch, Role, WorkerId, WorkerInfo
from baton.registry.directory import DirectoryRegistry
from kvtransfer.group_card import join_cards
from kvtransfer.metadata import PeerCard, ShmEndpoint, seal_card
from services.worker import nonces, peer_gate
from services.worker.peer_gate import PeerGate, Refusal
from services.worker.peer_members import PeerMembers

SECRET = b"0123456789abcdef"
LAYOUT = KvLayout("m", 1, 1, 1, 4, "float32")
READER = ("decode-0", "e1")
GRACE_S = 0.3


def peer(worker_id="decode-0", epoch="e1"):
    return PeerRef(WorkerId(worker_id), Epoch(epoch), "127.0.0.1:1")


def card_for(nonce, worker_id="decode-0", epoch="e1", *, secret=SECRET, **changes):
    card = PeerCard(
        worker_id=WorkerId(worker_id),
        epoch=Epoch(epoch),
        layout=LAYOUT,
        num_blocks=8,
        num_scratch_blocks=0,
        tp_rank=0,
        tp_size=1,
        host_id="h",
        pid_namespace="n",
        pid=1,
        endpoints=(ShmEndpoint("/p", 4096, 0, 0, bytes(32)),),
        nonce=nonce,
        issued_at_s=1000.0,
        expires_at_s=5000.0,
    )
    return seal_card(dataclasses.replace(card, **changes), secret)


class Door:
    """A gate with hands on its clocks and its members."""

    def __init__(self, registry=None, *, is_announced=True):
        self.clock, self.wall_clock = ManualClock(50.0), ManualClock(2000.0)
        self.gate = PeerGate(
            secret=SECRET,
            layout=LAYOUT,
            members=PeerMembers(registry),
            clock=self.clock,
            wall_clock=self.wall_clock,
            member_grace_s=GRACE_S,
        )
        if is_announced:
            self.gate.members("router", [peer()])

    async def enter(self, worker_id="decode-0", epoch="e1", **changes):
        nonce = self.gate.challenge(worker_id, epoch)
        return await self.gate.admit(card_for(nonce, worker_id, epoch, **changes), challenge=nonce)

    async def refused(self, reason, error, match, entering):
        before = self.gate.refusals[reason]
        with pytest.raises(error, match=match):
            await entering
        assert self.gate.refusals[reason] == before + 1
        assert self.gate.num_refused == sum(self.gate.refusals.values())


@pytest.fixture
async def door():
    return Door()


async def test_member_with_a_card_over_its_nonce_is_admitted(door):
    card = await door.enter()
    assert (card.worker_id, card.epoch) == READER
    await door.gate.check(*READER)
    assert door.gate.num_refused == 0


async def test_worker_with_a_pool_per_rank_shows_the_cards_of_all(door):
    nonce = door.gate.challenge(*READER)
    ranks = [card_for(nonce, tp_rank=rank, tp_size=2) for rank in range(2)]
    shown = [join_cards(ranks[::-1]), ranks[1], join_cards([ranks[0], ranks[1][:-1] + b" "])]
    for card, reason in zip(shown, ("is of rank 1 of 2", "rank 1 of 2", "signature"), strict=True):
        entering = door.gate.admit(card, challenge=nonce)
        await door.refused(Refusal.BAD_CARD, BadPeerCard, reason, entering)
    card = await door.gate.admit(join_cards(ranks), challenge=nonce)
    assert (card.worker_id, card.epoch) == READER


async def test_stream_needs_a_card_first(door):
    entering = door.gate.check("decode-0", "e2")
    await door.refused(Refusal.NOT_ADMITTED, IncompatiblePeer, "has not connected", entering)


async def test_recorded_connect_is_of_no_use(door):
    nonce = door.gate.challenge(*READER)
    card = card_for(nonce)
    await door.gate.admit(card, challenge=nonce)
    again = door.gate.admit(card, challenge=nonce)
    await door.refused(Refusal.REPLAYED, BadPeerCard, "used already", again)
    other_nonce = door.gate.admit(card, challenge=door.gate.challenge(*READER))
    await door.refused(Refusal.BAD_CARD, BadPeerCard, "another connection", other_nonce)


async def test_card_recorded_before_a_restart_is_refused(door):
    nonce = door.gate.challenge(*READER)
    restarted = Door()
    entering = restarted.gate.admit(card_for(nonce), challenge=nonce)
    await restarted.refused(Refusal.UNKNOWN_NONCE, BadPeerCard, "not of this worker", entering)


async def test_nonce_serves_only_who_asked_for_it(door):
    door.gate.members("router", [peer(), peer("decode-1")])
    nonce = door.gate.challenge(*READER)
    entering = door.gate.admit(card_for(nonce, "decode-1"), challenge=nonce)
    await door.refused(Refusal.UNKNOWN_NONCE, BadPeerCard, "another name", entering)
    # Worker and epoch are not just glued together.
    nonce = door.gate.challenge("decode-0e", "1")
    entering = door.gate.admit(card_for(nonce), challenge=nonce)
    await door.refused(Refusal.UNKNOWN_NONCE, BadPeerCard, "another name", entering)


async def test_late_card_is_refused(door):
    nonce = door.gate.challenge(*READER)
    door.clock.advance(nonces.NONCE_LIFETIME_S)
    entering = door.gate.admit(card_for(nonce), challenge=nonce)
    await door.refused(Refusal.LATE, BadPeerCard, "older than 10 s", entering)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda card: card[:-1], "signature"),
        (lambda card: card[:32], "32 bytes"),
        (lambda card: b"", "0 bytes"),
        (lambda card: card + b" ", "signature"),
        (lambda card: bytes(32) + card[32:], "signature"),
        (lambda card: card.ljust(1 << 17, b" "), "131072 bytes"),
        (lambda card: card[:32] + card[32:].replace(b'"pid": 1', b'"pid": 2'), "signature"),
    ],
    ids=["cut", "no body", "empty", "longer", "no signature", "huge", "edited"],
)
async def test_spoilt_card_is_refused(door, spoil, match):
    nonce = door.gate.challenge(*READER)
    entering = door.gate.admit(spoil(card_for(nonce)), challenge=nonce)
    await door.refused(Refusal.BAD_CARD, BadPeerCard, match, entering)
    assert await door.enter(), "the peer stays welcome"


async def test_spoilt_card_does_not_use_up_the_nonce(door):
    nonce = door.gate.challenge(*READER)
    card = card_for(nonce)
    with pytest.raises(BadPeerCard):
        await door.gate.admit(card[:-1], challenge=nonce)
    await door.gate.admit(card, challenge=nonce)


@pytest.mark.parametrize("challenge", [b"", b"short", bytes(nonces.NONCE_BYTES), bytes(64)])
async def test_made_up_nonce_is_refused(door, challenge):
    nonce = challenge if len(challenge) >= 16 else bytes(16)
    entering = door.gate.admit(card_for(nonce), challenge=challenge)
    with pytest.raises(BadPeerCard):
        await entering
    assert door.gate.num_refused == 1


async def test_foreign_secret_and_expired_card_are_refused(door):
    foreign = door.enter(secret=b"another deployment")
    await door.refused(Refusal.BAD_CARD, BadPeerCard, "share one secret", foreign)
    door.wall_clock.advance(4000.0)
    await door.refused(Refusal.BAD_CARD, BadPeerCard, "expired 1000 s ago", door.enter())


async def test_other_version_and_layout_are_named(door):
    old = door.enter(protocol_version=1)
    await door.refused(Refusal.INCOMPATIBLE, IncompatiblePeer, "protocol version", old)
    other = dataclasses.replace(LAYOUT, dtype="bfloat16")
    entering = door.enter(layout=other)
    await door.refused(Refusal.INCOMPATIBLE, IncompatiblePeer, "bfloat16", entering)


@pytest.mark.parametrize("name", [("", "e1"), ("decode-0", ""), ("d" * 129, "e1")])
async def test_unusable_name_gets_no_nonce(door, name):
    with pytest.raises(BadPeerCard, match="1 to 128 characters"):
        door.gate.challenge(*name)
    assert door.gate.refusals[Refusal.BAD_NAME] == 1


async def test_stranger_is_refused_after_the_grace(door):
    entering = door.enter("stranger")
    await door.refused(Refusal.NOT_A_MEMBER, IncompatiblePeer, "not registered", entering)
    with pytest.raises(IncompatiblePeer):
        await door.gate.check("stranger", "e1")


async def test_new_worker_is_admitted_once_it_is_announced(door):
    entering = asyncio.create_task(door.enter("decode-1"))
    await asyncio.sleep(0.05)
    assert not entering.done()
    door.gate.members("router", [peer(), peer("decode-1")])
    assert (await entering).worker_id == "decode-1"


async def test_replaced_epoch_is_refused_at_once(door):
    await door.enter()
    door.gate.members("router", [peer(epoch="e2")])
    door.gate._member_grace_s = 60.0
    await door.refused(Refusal.OUTDATED, IncompatiblePeer, "restarted", door.enter())
    checking = door.gate.check(*READER)
    await door.refused(Refusal.OUTDATED, IncompatiblePeer, "restarted", checking)
    assert await door.enter(epoch="e2")


async def test_second_worker_of_one_id_is_refused(door):
    entering = door.enter(epoch="e9")
    await door.refused(Refusal.OUTDATED, IncompatiblePeer, "two workers have one id", entering)


async def test_worker_that_left_gets_no_new_stream(door):
    await door.enter()
    door.gate.members("router", [])
    checking = door.gate.check(*READER)
    await door.refused(Refusal.NOT_A_MEMBER, IncompatiblePeer, "not registered", checking)
    door.gate.members("router", [peer()])
    again = door.gate.check(*READER)
    await door.refused(Refusal.NOT_ADMITTED, IncompatiblePeer, "has not connected", again)


async def test_routers_add_up_and_the_last_one_is_remembered(door):
    door.gate.members("second", [peer("decode-1")])
    await door.enter()
    await door.enter("decode-1")
    door.gate.router_gone("router")
    await door.enter("decode-1")
    await door.refused(Refusal.NOT_A_MEMBER, IncompatiblePeer, "not registered", door.enter())
    door.gate.router_gone("second")
    await door.enter("decode-1")
    door.gate.members("third", [peer()])
    await door.enter()
    stale = door.enter("decode-1")
    await door.refused(Refusal.NOT_A_MEMBER, IncompatiblePeer, "not registered", stale)


async def test_without_any_source_the_card_alone_counts(caplog):
    door = Door(is_announced=False)
    with caplog.at_level(logging.WARNING):
        await door.enter()
        await door.enter("decode-1")
    assert len([r for r in caplog.records if "card alone" in r.message]) == 1


async def test_registry_is_the_only_source_where_there_is_one(tmp_path):
    registry = DirectoryRegistry(tmp_path / "registry", clock=ManualClock(1.0))
    door = Door(registry)
    # What a router says is not listened to.
    await door.refused(Refusal.NOT_A_MEMBER, IncompatiblePeer, "not registered", door.enter())
    entering = asyncio.create_task(door.enter())
    await asyncio.sleep(0.05)
    await registry.register(worker_info(), ttl_s=10)
    assert (await entering).worker_id == "decode-0"


async def test_unreadable_registry_keeps_its_last_members(tmp_path):
    registry = DirectoryRegistry(tmp_path / "registry", clock=ManualClock(1.0))
    await registry.register(worker_info(), ttl_s=10)
    is_broken = False

    class Flaky:
        async def list(self):
            if is_broken:
                raise Unavailable("gone")
            return await registry.list()

    door = Door(Flaky(), is_announced=False)
    await door.enter()
    is_broken = True
    await asyncio.sleep(0.25)
    await door.enter()


async def test_asking_leaves_nothing_behind_and_using_is_bounded(door):
    for _ in range(10000):
        door.gate.challenge(*READER)
    assert not door.gate._nonces._used
    for _ in range(nonces.MAX_USED_PER_PEER):
        await door.enter()
    await door.refused(Refusal.TOO_MANY, BadPeerCard, "more than 64", door.enter())
    door.clock.advance(nonces.NONCE_LIFETIME_S + 1)
    await door.enter()
    assert len(door.gate._nonces._used) == 1


async def test_cards_that_wait_for_members_are_bounded(door, monkeypatch):
    monkeypatch.setattr(peer_gate, "MAX_WAITING", 2)
    waiting = [asyncio.create_task(door.enter(f"stranger-{i}")) for i in range(2)]
    await asyncio.sleep(0.05)
    await door.refused(Refusal.TOO_MANY, Unavailable, "limit 2", door.enter())
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, IncompatiblePeer) for outcome in outcomes)
    await door.enter()


async def test_admitted_readers_are_bounded(door, monkeypatch):
    monkeypatch.setattr(peer_gate, "MAX_ADMITTED", 2)
    names = [f"decode-{i}" for i in range(3)]
    door.gate.members("router", [peer(name) for name in names])
    for name in names:
        await door.enter(name)
    with pytest.raises(IncompatiblePeer, match="has not connected"):
        await door.gate.check("decode-0", "e1")
    await door.gate.check("decode-2", "e1")


async def test_same_refusal_is_logged_once_a_minute(door, caplog):
    async def knock():
        with pytest.raises(BadPeerCard):
            await door.enter(secret=b"another deployment")

    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            await knock()
        assert len(caplog.records) == 1
        door.clock.advance(peer_gate.LOG_PERIOD_S + 1)
        await knock()
    assert len(caplog.records) == 2
    assert caplog.records[1].fields == {
        "reader": "",
        "reason": "bad card",
        "num_since_last_line": 4,
    }


async def test_no_line_of_the_log_holds_a_card(door, caplog):
    with caplog.at_level(logging.DEBUG):
        nonce = door.gate.challenge(*READER)
        card = card_for(nonce, secret=b"another deployment")
        with pytest.raises(BadPeerCard) as caught:
            await door.gate.admit(card, challenge=nonce)
    told = caplog.text + str(caught.value)
    body = json.loads(card[32:])
    assert body["nonce"] not in told and body["host_id"] == "h" and "/p" not in told


def worker_info():
    import os

    return WorkerInfo(
        worker_id=WorkerId("decode-0"),
        epoch=Epoch("e1"),
        role=Role.DECODE,
        address="127.0.0.1:1",
        model_name="m",
        layout=LAYOUT,
        num_blocks=8,
        max_model_len=64,
        max_num_seqs=4,
        transport="shm",
        pid=os.getpid(),
    )
