import asyncio
import dataclasses

import grpc
import pytest

from baton.core.request import Work
from baton.core.worker_info import PROTOCOL_VERSION, Role
from baton.rpc.v1 import transfer_pb2 as pb
from baton.rpc.v1.transfer_pb2_grpc import TransferStub
from kvtransfer.metadata import open_card, seal_card

PROMPT = tuple(range(1, 23))
SECRET = b"0123456789abcdef"


def card_of(worker, **changes):
    transport = worker.server._backend.transport
    card = open_card(transport.card(), SECRET, now_s=0.0)
    return seal_card(dataclasses.replace(card, **changes), SECRET)


async def connect(owner, card, version=PROTOCOL_VERSION):
    request = pb.ConnectRequest(protocol_version=version, card=card)
    return await TransferStub(owner.channel).Connect(request, timeout=5)


@pytest.fixture
async def pair(workers):
    return await workers.start(Role.PREFILL), await workers.start(Role.DECODE)


async def test_cards_are_exchanged(pair):
    owner, reader = pair
    reply = await connect(owner, card_of(reader))
    card = open_card(reply.card, SECRET, now_s=0.0)
    assert (card.worker_id, card.epoch) == (owner.info.worker_id, owner.info.epoch)


@pytest.mark.parametrize(
    ("changes", "version", "code", "message"),
    [
        ({}, PROTOCOL_VERSION + 1, "FAILED_PRECONDITION", "protocol version"),
        ({"transport": "nixl"}, PROTOCOL_VERSION, "FAILED_PRECONDITION", "KV transport"),
        ({"expires_at_s": 1.0}, PROTOCOL_VERSION, "UNAUTHENTICATED", "expired"),
        (None, PROTOCOL_VERSION, "UNAUTHENTICATED", "signature"),
    ],
)
async def test_unfit_reader_is_refused_with_a_reason(pair, changes, version, code, message):
    owner, reader = pair
    card = card_of(reader, **(changes or {}))
    if changes is None:
        card = bytes([card[0] ^ 1]) + card[1:]
    with pytest.raises(grpc.aio.AioRpcError, match=message) as refused:
        await connect(owner, card, version)
    assert refused.value.code() is grpc.StatusCode[code]


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
    await connect(owner, card_of(reader))
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
