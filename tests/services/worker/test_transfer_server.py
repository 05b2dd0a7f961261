import asyncio
import dataclasses
import logging

import grpc
import pytest

from baton.core.block import BlockId
from baton.core.request import RequestId, Work
from baton.core.worker_info import PROTOCOL_VERSION, Role
from baton.engine.engine import ChunkDone
from baton.rpc.v1 import transfer_pb2 as pb
from baton.rpc.v1.transfer_pb2_grpc import TransferStub
from kvtransfer.messages import Refused
from kvtransfer.metadata import open_card, seal_card
from kvtransfer.owner import ReaderId

PROMPT = tuple(range(1, 23))
SECRET = b"0123456789abcdef"


NONCE = b"n" * 32


async def challenge(owner, reader):
    request = pb.ChallengeRequest(worker_id=reader.info.worker_id, epoch=reader.info.epoch)
    return (await TransferStub(owner.channel).Challenge(request, timeout=5)).nonce


def card_of(worker, nonce, /, **changes):
    transport = worker.server._backend.transport
    card = open_card(transport.card(nonce), SECRET, now_s=0.0, nonce=nonce)
    return seal_card(dataclasses.replace(card, **changes), SECRET)


async def connect(owner, card, nonce, version=PROTOCOL_VERSION):
    request = pb.ConnectRequest(protocol_version=version, card=card, nonce=NONCE, challenge=nonce)
    return await TransferStub(owner.channel).Connect(request, timeout=5)


@pytest.fixture
async def pair(workers):
    return await workers.start(Role.PREFILL), await workers.start(Role.DECODE)


async def test_cards_are_exchanged_over_each_others_nonces(pair):
    owner, reader = pair
    nonce = await challenge(owner, reader)
    reply = await connect(owner, card_of(reader, nonce), nonce)
    card = open_card(reply.card, SECRET, now_s=0.0, nonce=NONCE)
    assert (card.worker_id, card.epoch) == (owner.info.worker_id, owner.info.epoch)


@pytest.mark.parametrize(
    ("changes", "version", "code", "message"),
    [
        ({}, PROTOCOL_VERSION + 1, "FAILED_PRECONDITION", "protocol version"),
        ({"expires_at_s": 1.0}, PROTOCOL_VERSION, "UNAUTHENTICATED", "expired"),
        ({"nonce": NONCE}, PROTOCOL_VERSION, "UNAUTHENTICATED", "replayed"),
        (None, PROTOCOL_VERSION, "UNAUTHENTICATED", "signature"),
    ],
)
async def test_unfit_reader_is_refused_with_a_reason(pair, changes, version, code, message):
    owner, reader = pair
    nonce = await challenge(owner, reader)
    card = card_of(reader, nonce, **(changes or {}))
    if changes is None:
        card = bytes([card[0] ^ 1]) + card[1:]
    with pytest.raises(grpc.aio.AioRpcError, match=message) as refused:
        await connect(owner, card, nonce, version)
    assert refused.value.code() is grpc.StatusCode[code]


async def test_recorded_connect_is_of_no_use_to_another(pair):
    owner, reader = pair
    nonce = await challenge(owner, reader)
    card = card_of(reader, nonce)
    await connect(owner, card, nonce)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await connect(owner, card, nonce)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_reader_with_an_unusable_nonce_of_its_own_gets_no_card(pair):
    owner, reader = pair
    nonce = await challenge(owner, reader)
    request = pb.ConnectRequest(
        protocol_version=PROTOCOL_VERSION,
        card=card_of(reader, nonce),
        nonce=b"short",
        challenge=nonce,
    )
    with pytest.raises(grpc.aio.AioRpcError, match="nonce has 5 bytes"):
        await TransferStub(owner.channel).Connect(request, timeout=5)


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (
            pb.ReaderMessage(hello=pb.ReaderHello(worker_id="x", epoch="y")),
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
        (
            pb.ReaderMessage(watch=pb.Watch(request_id="a")),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
)
async def test_stream_of_an_unknown_reader_is_refused(pair, first, code):
    owner, _ = pair
    call = TransferStub(owner.channel).Leases()
    await call.write(first)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() is code


async def open_stream(owner, reader):
    nonce = await challenge(owner, reader)
    await connect(owner, card_of(reader, nonce), nonce)
    call = TransferStub(owner.channel).Leases()
    hello = pb.ReaderHello(worker_id=reader.info.worker_id, epoch=reader.info.epoch)
    await call.write(pb.ReaderMessage(hello=hello))
    return call


async def test_reader_that_reconnects_gets_all_chunks_again_and_completes(pair, make_request):
    owner, reader = pair
    router = await owner.router()
    first = await open_stream(owner, reader)
    await first.write(pb.ReaderMessage(watch=pb.Watch(request_id="a")))
    await router.submit(make_request("a", PROMPT, work=Work.PREFILL, max_tokens=5))
    await router.ended("a")
    assert (await first.read()).chunk.first_block_index == 0
    first.cancel()

    second = await open_stream(owner, reader)
    await second.write(pb.ReaderMessage(watch=pb.Watch(request_id="a")))
    chunk = (await second.read()).chunk
    assert (chunk.is_last, len(chunk.block_ids)) == (True, 6)
    assert list(chunk.first_token.token_ids) == router.tokens("a")
    complete = pb.Complete(lease_id=chunk.lease_id, epoch=chunk.epoch)
    await second.write(pb.ReaderMessage(complete=complete))
    assert (await second.read()).completed.valid
    await owner.assert_nothing_leaked()
    second.cancel()


async def test_malformed_message_ends_the_stream_with_a_reason(pair):
    owner, reader = pair
    call = await open_stream(owner, reader)
    fetch = pb.FetchPrefix(request_id="a", block_hashes=b"17 bytes are bad.")
    await call.write(pb.ReaderMessage(fetch_prefix=fetch))
    with pytest.raises(grpc.aio.AioRpcError, match="whole number of 16-byte hashes") as refused:
        await call.read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_stream_closed_while_its_first_message_leaves_ends_for_the_reader(pair):
    owner, reader = pair
    leases = owner.server.parts.leases
    name = ReaderId(f"{reader.info.worker_id}@{reader.info.epoch}")
    for _ in range(5):
        call = await open_stream(owner, reader)
        async with asyncio.timeout(5):
            while name not in leases._streams:
                await asyncio.sleep(0.001)
        leases._streams[name].send(Refused(RequestId("a"), "x"))
        await asyncio.sleep(0)
        leases.close()
        with pytest.raises(grpc.aio.AioRpcError, match="replaced or fell behind"):
            async with asyncio.timeout(5):
                while await call.read() is not grpc.aio.EOF:
                    pass
        assert name not in leases._streams


async def test_stream_that_breaks_in_a_hand_off_is_restored(pair, make_request, expected):
    owner, reader = pair
    owner.runner.step_s = 0.05
    on_owner, on_reader = await owner.router(), await reader.router()
    await on_reader.submit(
        make_request("a", PROMPT, work=Work.DECODE, peer=owner.peer, max_tokens=5)
    )
    await on_owner.submit(make_request("a", PROMPT, work=Work.PREFILL, max_tokens=5))
    await asyncio.sleep(0.06)
    owner.server.parts.leases.close()
    end = await on_reader.ended("a")
    assert not end.error
    assert on_owner.tokens("a") + on_reader.tokens("a") == expected(PROMPT, 5)
    await owner.assert_nothing_leaked()
    await reader.assert_nothing_leaked()


def asks(kind, **fields):
    return pb.ReaderMessage(**{kind: fields})


async def test_nonsense_of_one_reader_is_refused_with_reasons_and_disturbs_nobody(
    workers, pair, make_request, expected, wait_for, caplog
):
    caplog.set_level(logging.INFO)
    owner, reader = pair
    stranger = await workers.start(Role.DECODE)
    owner.runner.step_s = 0.02
    on_owner, on_reader = await owner.router(), await reader.router()
    for work, router, peer in (
        (Work.DECODE, on_reader, owner.peer),
        (Work.PREFILL, on_owner, None),
    ):
        await router.submit(make_request("a", PROMPT, work=work, peer=peer, max_tokens=5))
    call = await open_stream(owner, stranger)
    epoch = owner.info.epoch
    questions = [
        (asks("fetch_prefix", request_id="f"), "no block hashes were sent"),
        (asks("fetch_prefix", request_id="g", block_hashes=b"x" * 16), "is cached here"),
        (asks("freeze", request_id="nobody's"), "takes no such request over"),
        (asks("takeover", request_id="nobody's"), "is not on this worker"),
    ]
    for question, reason in questions:
        await call.write(question)
        assert reason in (await call.read()).refused.reason
        assert reason in caplog.text
    await call.write(asks("complete", lease_id="made up", epoch=epoch))
    assert not (await call.read()).completed.valid
    assert "a lease that is over, or not its own: made up" in caplog.text
    await call.write(asks("renew", lease_id="made up"))
    await call.write(asks("give_up", request_id="a", reason="not mine"))
    await on_reader.ended("a")
    assert on_owner.tokens("a") + on_reader.tokens("a") == expected(PROMPT, 5)

    # A lease of another start of the owner, and then of this one.
    await call.write(asks("watch", request_id="b"))
    await on_owner.submit(make_request("b", PROMPT, work=Work.PREFILL, max_tokens=5))
    while not (chunk := (await call.read()).chunk).is_last:
        pass
    for named, valid in ((f"not {epoch}", False), (epoch, True)):
        await call.write(asks("complete", lease_id=chunk.lease_id, epoch=named))
        assert (await call.read()).completed.valid == valid
    call.cancel()
    await owner.assert_nothing_leaked()
    await reader.assert_nothing_leaked()


async def test_blocks_outside_the_pool_end_one_request_and_leave_the_link_alone(
    pair, make_request, expected, wait_for, caplog
):
    caplog.set_level(logging.INFO)
    owner, reader = pair
    on_owner, on_reader = await owner.router(), await reader.router()
    bad = ChunkDone(RequestId("a"), 0, (BlockId(10**6),), is_last=False)
    owner.server.parts.leases.announce(bad)
    request = make_request("a", PROMPT, work=Work.DECODE, peer=owner.peer, max_tokens=5)
    await on_reader.submit(request)
    reason = f"block id 1000000 is outside {owner.info.worker_id}'s pool"
    end = await on_reader.ended("a")
    assert end.is_retryable and reason in end.error
    await wait_for(lambda: f"reader gave up: {reason}" in caplog.text)
    link = reader.server.parts.mesh.link_to(owner.peer)
    for work, router, peer in (
        (Work.DECODE, on_reader, owner.peer),
        (Work.PREFILL, on_owner, None),
    ):
        await router.submit(make_request("b", PROMPT, work=work, peer=peer, max_tokens=5))
    await on_reader.ended("b")
    assert on_owner.tokens("b") + on_reader.tokens("b") == expected(PROMPT, 5)
    assert reader.server.parts.mesh.link_to(owner.peer) is link
    await owner.assert_nothing_leaked()
    await reader.assert_nothing_leaked()
