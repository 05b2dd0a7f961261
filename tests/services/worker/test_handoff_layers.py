"""KV that is read layer by layer while its prompt is computed, between two workers."""

from __future__ import annotations

import asyncio
import time

import pytest

from baton.core.request import FinishReason, Work
from baton.core.worker_info import Role

PROMPT = tuple(range(1, 40))
WAIT_S = 5.0


@pytest.fixture
async def pair(workers):
    """A prefill worker that tells layers, a decode worker and a router's session to each."""
    prefill = await workers.start(Role.PREFILL, layer_notice_min_tokens=1)
    decode = await workers.start(Role.DECODE)
    return prefill, decode, await prefill.router(), await decode.router()


@pytest.fixture
def hand_off(make_request, pair):
    async def submit(name, prompt=PROMPT, **fields):
        prefill, _, on_prefill, on_decode = pair
        decode_request = make_request(name, prompt, work=Work.DECODE, peer=prefill.peer, **fields)
        await on_decode.submit(decode_request)
        # Its question is with the owner, its blocks are reserved.
        await asyncio.sleep(0.2)
        await on_prefill.submit(make_request(name, prompt, work=Work.PREFILL, **fields))

    return submit


def num_reads(worker):
    return worker.server.parts.reads._fetcher.counters.reads


def until(claim):
    """On an engine's thread, which would otherwise go on."""
    deadline_s = time.monotonic() + WAIT_S
    while not claim() and time.monotonic() < deadline_s:
        time.sleep(0.002)


@pytest.mark.parametrize("num_tokens", [39, 13, 32], ids=["chunks", "one chunk", "whole blocks"])
async def test_all_is_read_before_the_last_step_ends(pair, hand_off, expected, num_tokens):
    prefill, decode, on_prefill, on_decode = pair
    prompt = PROMPT[:num_tokens]
    prefill.runner.in_the_middle = lambda: until(lambda: num_reads(decode) >= -(-num_tokens // 16))
    await hand_off("a", prompt, max_tokens=12)
    end = await on_decode.ended("a")
    assert on_prefill.tokens("a") + on_decode.tokens("a") == expected(prompt, 12)
    stats = end.timeline.transfer
    num_blocks = -(-num_tokens // 4)
    assert (stats.num_blocks, stats.num_bytes) == (num_blocks, num_blocks * 32)
    assert stats.exposed_seconds == 0.0
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_cancel_in_the_middle_of_the_last_step_leaves_nothing(
    pair, hand_off, make_request, expected, side
):
    prefill, decode, on_prefill, on_decode = pair
    loop = asyncio.get_running_loop()

    def cancel():
        router = on_prefill if side == "prefill" else on_decode
        asyncio.run_coroutine_threadsafe(router.cancel("a"), loop).result(WAIT_S)
        until(lambda: num_reads(decode) >= 1)
        prefill.runner.in_the_middle = lambda: None

    prefill.runner.in_the_middle = cancel
    await hand_off("a", PROMPT[:13], max_tokens=1000)
    await on_prefill.ended("a")
    if side == "prefill":
        # The step had all of the prompt, so the decode worker may have what it needs.
        await on_decode.cancel("a")
    else:
        assert (await on_decode.ended("a")).finish_reason is FinishReason.CANCELLED
        await on_prefill.cancel("a")
    await on_decode.ended("a")
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()
    await hand_off("b", PROMPT[:14], max_tokens=5)
    await on_decode.ended("b")
    assert on_prefill.tokens("b") + on_decode.tokens("b") == expected(PROMPT[:14], 5)


async def test_the_same_request_again_reads_nothing_of_its_first_life(pair, hand_off, expected):
    """Its blocks may have been filled with anything else in between."""
    prefill, decode, on_prefill, on_decode = pair
    for number, prompt in enumerate((PROMPT[:13], PROMPT[3:18], PROMPT[:30])):
        await hand_off(f"r{number}", prompt, max_tokens=6, is_cached=False)
        await on_decode.ended(f"r{number}")
        got = on_prefill.tokens(f"r{number}") + on_decode.tokens(f"r{number}")
        assert got == expected(prompt, 6)
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()
