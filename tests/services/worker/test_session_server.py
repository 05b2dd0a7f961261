import asyncio
import contextlib
import dataclasses

import grpc
import pytest

from baton.core.block import HASH_SCHEME, BlockHash, next_hash, root_hash
from baton.core.request import FinishReason, Work
from baton.core.worker_info import PROTOCOL_VERSION, Role
from baton.rpc.convert import request_to_wire, worker_info_from_wire
from baton.rpc.v1 import worker_pb2 as pb
from services.worker.config import SessionConfig
from services.worker.session_server import MAX_SNAPSHOT_BLOCKS

PROMPT = tuple(range(1, 23))


async def test_request_streams_its_tokens_and_ends_with_a_time_line(
    workers, make_request, expected
):
    worker = await workers.start()
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=9))
    end = await router.ended("a")
    assert end.finish_reason is FinishReason.LENGTH
    assert end.timeline is not None and len(end.timeline.points) == 5
    assert router.tokens("a") == expected(PROMPT, 9)
    await worker.assert_nothing_leaked()


async def test_welcome_tells_identity_load_and_cache(workers, make_request):
    worker = await workers.start(Role.PREFILL)
    first = await worker.router("r1")
    assert first.info == worker.info
    assert first.load.total_blocks == 64
    assert not first.hashes
    await first.submit(make_request("a", PROMPT, max_tokens=2))
    await first.ended("a")
    second = await worker.router("r2")
    assert len(second.hashes) == len(PROMPT) // 4
    assert second.hashes == first.hashes
    assert second.kv_sequence == first.kv_sequence > 0


async def test_welcome_tells_how_blocks_are_named_and_what_the_tiers_hold(workers):
    worker = await workers.start()
    loop = worker.server.parts.engine
    snapshot = await loop.snapshot()
    host, disk = ([BlockHash(bytes([n] * 16))] for n in (1, 2))
    told = dataclasses.replace(snapshot, host_hashes=host, disk_hashes=disk)

    async def answer():
        return told

    loop.snapshot = answer
    welcome = (await worker.router()).welcome
    assert (welcome.host_hashes, welcome.disk_hashes) == (host[0], disk[0])
    hashing, layout = welcome.hashing, worker.info.layout
    assert (hashing.scheme, hashing.block_size) == (HASH_SCHEME, layout.block_size)
    assert hashing.fingerprint == layout.fingerprint
    tokens = range(layout.block_size)
    assert hashing.first_hash == next_hash(root_hash(layout.fingerprint), tokens)


async def _holds_on_disk(worker, num_blocks):
    loop = worker.server.parts.engine
    snapshot = await loop.snapshot()
    told = dataclasses.replace(snapshot, disk_hashes=[BlockHash(bytes(16))] * num_blocks)

    async def answer():
        return told

    loop.snapshot = answer


@pytest.mark.slow
async def test_largest_snapshot_fits_into_a_message(workers):
    worker = await workers.start()
    await _holds_on_disk(worker, MAX_SNAPSHOT_BLOCKS)
    welcome = (await worker.router()).welcome
    assert welcome.num_left_out == 0
    assert len(welcome.disk_hashes) == 16 * MAX_SNAPSHOT_BLOCKS


async def test_snapshot_that_no_message_holds_is_left_out_and_the_session_serves(
    workers, make_request, expected
):
    worker = await workers.start()
    await _holds_on_disk(worker, MAX_SNAPSHOT_BLOCKS + 1)
    router = await worker.router()
    assert router.welcome.num_left_out == MAX_SNAPSHOT_BLOCKS + 1
    assert not router.welcome.disk_hashes
    answer_of_info = await worker.stub.GetInfo(pb.GetInfoRequest(), timeout=30)
    assert answer_of_info.num_left_out == MAX_SNAPSHOT_BLOCKS + 1
    await router.submit(make_request("a", PROMPT, max_tokens=9))
    await router.ended("a")
    assert router.tokens("a") == expected(PROMPT, 9)


async def test_every_router_hears_all_events_but_only_its_own_tokens(
    workers, make_request, wait_for
):
    worker = await workers.start()
    first, second = await worker.router("r1"), await worker.router("r2")
    await first.submit(make_request("a", PROMPT, max_tokens=5))
    await second.submit(make_request("b", PROMPT[::-1], max_tokens=5))
    await first.ended("a")
    await second.ended("b")
    assert set(first.deltas) == {"a"}
    assert set(second.deltas) == {"b"}
    await wait_for(lambda: first.hashes == second.hashes)
    snapshot = await worker.server.parts.engine.snapshot()
    assert first.hashes == set(snapshot.cached_hashes)
    assert first.kv_sequence == snapshot.kv_sequence


async def test_evicted_blocks_are_reported(workers, make_request, wait_for):
    worker = await workers.start(num_blocks=16)
    router = await worker.router()
    for number in range(6):
        prompt = [(number * 31 + i) % 97 for i in range(24)]
        await router.submit(make_request(f"r{number}", prompt, max_tokens=3))
        await router.ended(f"r{number}")
    assert any(removed for m in router.messages for _, removed in m.events)
    snapshot = await worker.server.parts.engine.snapshot()
    await wait_for(lambda: router.hashes == set(snapshot.cached_hashes))


async def test_idle_worker_repeats_its_load(workers, wait_for):
    worker = await workers.start()
    router = await worker.router()
    await asyncio.sleep(0.9)
    assert 3 <= len(router.messages) <= 6
    assert all(not message.deltas for message in router.messages)


async def test_other_protocol_version_is_refused(workers):
    worker = await workers.start()
    call = worker.stub.Session()
    hello = pb.Hello(router_id="r", protocol_version=PROTOCOL_VERSION + 1)
    await call.write(pb.RouterMessage(hello=hello))
    with pytest.raises(grpc.aio.AioRpcError, match=f"version {PROTOCOL_VERSION + 1}") as refused:
        await call.read()
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    "message",
    [
        pb.RouterMessage(submit=pb.Submit(request_id="a")),
        pb.RouterMessage(),
        pb.RouterMessage(hello=pb.Hello(protocol_version=PROTOCOL_VERSION)),
    ],
)
async def test_session_without_a_proper_hello_is_refused(workers, message):
    worker = await workers.start()
    call = worker.stub.Session()
    await call.write(message)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def _submit(make_request, **changes):
    message = request_to_wire(make_request("bad", PROMPT, max_tokens=4))
    for name, value in changes.items():
        if isinstance(value, list):
            del getattr(message, name)[:]
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"work": pb.WORK_UNSPECIFIED}, "work 0"),
        ({"work": 99}, "work 99"),
        ({"work": pb.WORK_DECODE}, "kv_source"),
        ({"prompt_token_ids": []}, "prompt is empty"),
        ({"prompt_token_ids": [97] * 22}, "token id 97"),
        ({"prompt_token_ids": [1] * 1000}, "1000 tokens"),
        ({"block_hashes": b"123"}, "3 bytes"),
        ({"block_hashes": b"1" * 16 * 6}, "6 block hashes"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"output_token_ids": [1] * 4}, "nothing is left"),
        ({"request_id": ""}, "request_id"),
    ],
)
async def test_bad_submit_is_answered_and_the_session_goes_on(
    workers, make_request, changes, message
):
    worker = await workers.start()
    router = await worker.router()
    wire = _submit(make_request, **changes)
    await router.submit_wire(wire)
    end = await router.ended(wire.request_id)
    assert end.finish_reason is FinishReason.ERROR
    assert not end.is_retryable
    assert message in end.error
    await router.submit(make_request("good", PROMPT, max_tokens=3))
    assert (await router.ended("good")).finish_reason is FinishReason.LENGTH
    await worker.assert_nothing_leaked()


async def test_out_of_range_sampling_is_answered(workers, make_request):
    worker = await workers.start()
    router = await worker.router()
    wire = request_to_wire(make_request("bad", PROMPT))
    wire.sampling.top_p = 2.0
    await router.submit_wire(wire)
    assert "top_p must be between" in (await router.ended("bad")).error


async def test_unknown_kind_of_message_is_ignored(workers, make_request):
    worker = await workers.start()
    router = await worker.router()
    await router.call.write(pb.RouterMessage())
    await router.cancel("never-seen")
    await router.submit(make_request("a", PROMPT, max_tokens=3))
    assert (await router.ended("a")).finish_reason is FinishReason.LENGTH


async def test_id_in_use_is_refused_to_another_router(workers, make_request):
    worker = await workers.start(step_s=0.01)
    first, second = await worker.router("r1"), await worker.router("r2")
    await first.submit(make_request("a", PROMPT, max_tokens=30))
    await first.submit(make_request("b", PROMPT, max_tokens=1))
    await first.ended("b")
    await second.submit(make_request("a", PROMPT, max_tokens=30))
    end = await second.ended("a")
    assert end.finish_reason is FinishReason.ERROR
    assert "already in use" in end.error
    assert (await first.ended("a")).finish_reason is FinishReason.LENGTH


async def test_full_queue_is_a_retryable_error(workers, make_request):
    worker = await workers.start(step_s=0.02, max_num_waiting=2, max_num_seqs=1)
    router = await worker.router()
    for number in range(8):
        await router.submit(make_request(f"r{number}", PROMPT, max_tokens=2))
    ends = [await router.ended(f"r{number}") for number in range(8)]
    refused = [end for end in ends if end.finish_reason is FinishReason.ERROR]
    assert refused and all(end.is_retryable for end in refused)
    assert any(end.finish_reason is FinishReason.LENGTH for end in ends)


async def test_waiting_and_running_requests_can_be_cancelled(workers, make_request):
    worker = await workers.start(step_s=0.01, max_num_seqs=1, max_num_batched_tokens=16)
    router = await worker.router()
    await router.submit(make_request("running", PROMPT, max_tokens=500, ignore_eos=True))
    await router.submit(make_request("waiting", PROMPT, max_tokens=500))
    await asyncio.sleep(0.1)
    await router.cancel("waiting")
    await router.cancel("running")
    for name in ("waiting", "running"):
        assert (await router.ended(name)).finish_reason is FinishReason.CANCELLED
    await worker.assert_nothing_leaked()
    await router.cancel("running")
    await asyncio.sleep(0.05)
    assert len(router.ends("running")) == 1


async def test_one_router_cannot_cancel_what_another_submitted(workers, make_request):
    worker = await workers.start(step_s=0.01)
    first, second = await worker.router("r1"), await worker.router("r2")
    await first.submit(make_request("a", PROMPT, max_tokens=10))
    await asyncio.sleep(0.03)
    await second.cancel("a")
    assert (await first.ended("a")).finish_reason is FinishReason.LENGTH


async def test_requests_of_a_lost_router_are_cancelled(workers, make_request):
    worker = await workers.start(step_s=0.01)
    lost, other = await worker.router("lost"), await worker.router("other")
    for number in range(6):
        await lost.submit(make_request(f"r{number}", PROMPT, max_tokens=2000))
    await other.submit(make_request("mine", PROMPT, max_tokens=20))
    await asyncio.sleep(0.1)
    await lost.close()
    assert (await other.ended("mine")).finish_reason is FinishReason.LENGTH
    await worker.assert_nothing_leaked()


async def test_router_that_comes_back_replaces_its_old_session(workers, make_request, wait_for):
    worker = await workers.start(step_s=0.01)
    old = await worker.router("r")
    await old.submit(make_request("a", PROMPT, max_tokens=2000))
    new = await worker.router("r")
    assert await old.call.code() is grpc.StatusCode.UNAVAILABLE
    await new.submit(make_request("b", PROMPT, max_tokens=3))
    assert (await new.ended("b")).finish_reason is FinishReason.LENGTH
    await worker.assert_nothing_leaked()


async def test_deadline_ends_a_request_with_an_error(workers, make_request):
    worker = await workers.start(step_s=0.02)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=1000, deadline_s=0.15))
    end = await router.ended("a")
    assert end.finish_reason is FinishReason.ERROR
    assert not end.is_retryable
    assert "deadline of 0.15 s" in end.error
    await worker.assert_nothing_leaked()


async def test_router_that_does_not_read_is_cut_off(workers, make_request):
    session = SessionConfig(load_period_s=0.2, max_pending_tokens=400)
    worker = await workers.start(num_blocks=256, session=session, max_num_seqs=8)
    call = worker.stub.Session()
    hello = pb.Hello(router_id="slow", protocol_version=PROTOCOL_VERSION)
    await call.write(pb.RouterMessage(hello=hello))
    await call.read()
    other = await worker.router("other")
    # Nothing is read any more; HTTP/2 flow control fills up and the outbox grows. The end may
    # come between any two requests, which then cannot be written.
    with contextlib.suppress(grpc.aio.AioRpcError):
        for number in range(8):
            request = make_request(f"r{number}", PROMPT, max_tokens=100, logprobs=5)
            await call.write(pb.RouterMessage(submit=request_to_wire(request)))
    number = 0
    async with asyncio.timeout(30):
        while any(s.router_id == "slow" for s in worker.server.parts.sessions):
            number += 1
            request = make_request(f"x{number}", PROMPT, max_tokens=100)
            with contextlib.suppress(grpc.aio.AioRpcError):
                await call.write(pb.RouterMessage(submit=request_to_wire(request)))
            await asyncio.sleep(0.002)
    with pytest.raises(grpc.aio.AioRpcError, match="reads too slowly") as cut_off:
        while await call.read() is not grpc.aio.EOF:
            pass
    assert cut_off.value.code() is grpc.StatusCode.UNAVAILABLE
    await other.submit(make_request("fine", PROMPT, max_tokens=3))
    assert (await other.ended("fine")).finish_reason is FinishReason.LENGTH
    await worker.assert_nothing_leaked()


async def test_failing_step_is_a_retryable_error_and_the_worker_goes_on(workers, make_request):
    worker = await workers.start()
    router = await worker.router()
    worker.runner.fail_with = RuntimeError("device error")
    await router.submit(make_request("a", PROMPT, max_tokens=3))
    end = await router.ended("a")
    assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    await router.submit(make_request("b", PROMPT, max_tokens=3))
    assert (await router.ended("b")).finish_reason is FinishReason.LENGTH
    await worker.assert_nothing_leaked()


async def test_info_is_told_without_a_session(workers):
    worker = await workers.start(Role.PREFILL)
    reply = await worker.stub.GetInfo(pb.GetInfoRequest(), timeout=5)
    assert worker_info_from_wire(reply.info) == worker.info
    assert reply.load.total_blocks == 64


async def test_prefix_cache_hits_are_reported(workers, make_request, expected):
    worker = await workers.start()
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=4))
    await router.ended("a")
    await router.submit(make_request("b", PROMPT, max_tokens=4))
    end = await router.ended("b")
    assert end.num_cached_tokens == 20
    assert router.tokens("a") == router.tokens("b") == expected(PROMPT, 4)


async def test_work_for_the_other_pool_is_done_too(workers, make_request):
    worker = await workers.start(Role.PREFILL)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, work=Work.GENERATE, max_tokens=4))
    assert (await router.ended("a")).finish_reason is FinishReason.LENGTH
