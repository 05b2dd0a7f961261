"""A request's way through the dispatcher, while everything works."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from baton.core.block import chain_hashes, root_hash
from baton.core.errors import ContextLengthExceeded, ModelNotFound, NoWorker
from baton.core.logging import JsonFormatter
from baton.core.request import FinishReason, Work

LONG = list(range(1, 101))
SHORT = [5, 6, 7]


async def test_long_prompt_is_prefilled_remotely_and_joined(cluster):
    outcome = await cluster.generate(LONG, 12)
    cluster.assert_right(outcome, LONG, 12)
    (prefill,), (decode,) = cluster["p0"].submitted, cluster["d0"].submitted
    assert prefill.work is Work.PREFILL and decode.work is Work.DECODE
    assert prefill.request_id == decode.request_id
    assert decode.kv_source.worker_id == "p0"
    assert decode.kv_source.address == cluster["p0"].address
    assert len(prefill.block_hashes) == len(LONG) // 16
    assert prefill.block_hashes == decode.block_hashes
    assert outcome.usage.cached_tokens == 16
    await cluster.settled()
    assert not cluster["p0"].cancelled and not cluster["d0"].cancelled


async def test_first_token_does_not_wait_for_the_hand_off(cluster):
    cluster["d0"].faults.hold_kv = True
    stream = cluster.stream(cluster.input(LONG, 4))
    first = await asyncio.wait_for(anext(stream), 2)
    assert len(first.token_ids) == 1, "held KV leaves only the prefill worker's token"
    cluster["d0"].faults.hold_kv = False
    rest = [d async for d in stream]
    assert sum(len(d.token_ids) for d in rest) == 3


async def test_short_prompt_is_prefilled_on_the_decode_worker(cluster):
    outcome = await cluster.generate(SHORT, 5)
    cluster.assert_right(outcome, SHORT, 5)
    assert [r.work for r in cluster["d0"].submitted] == [Work.GENERATE]
    assert not cluster["p0"].submitted


async def test_single_token_needs_the_prefill_worker_only(cluster):
    outcome = await cluster.generate(LONG, 1)
    cluster.assert_right(outcome, LONG, 1)
    assert [r.work for r in cluster["p0"].submitted] == [Work.GENERATE]
    assert not cluster["d0"].submitted


async def test_end_with_the_first_token_cancels_decode(cluster):
    cluster["p0"].eos_at = 0
    outcome = await cluster.generate(LONG, 8)
    assert outcome.token_ids == [] and outcome.text == ""
    assert outcome.finish_reason is FinishReason.STOP
    assert outcome.stop_reason is None
    await cluster.settled()
    assert cluster["d0"].cancelled == [cluster["d0"].submitted[0].request_id]


async def test_end_of_sequence_has_no_stop_reason_but_stop_token_has(cluster):
    cluster["d0"].eos_at = 3
    outcome = await cluster.generate(LONG, 8)
    assert len(outcome.token_ids) == 3 and outcome.stop_reason is None
    cluster["d0"].eos_at = None
    stop = (sum(SHORT) + 2) % 26 + ord("a")
    outcome = await cluster.generate(SHORT, 8, stop_token_ids=(stop,))
    assert outcome.finish_reason is FinishReason.STOP
    assert outcome.stop_reason == stop and len(outcome.token_ids) == 2


async def test_stop_string_over_token_borders_ends_and_cancels(cluster):
    text = bytes((sum(LONG) + k) % 26 + ord("a") for k in range(20)).decode()
    outcome = await cluster.generate(LONG, 2000, stop=(text[4:7],), logprobs=0)
    assert outcome.text == text[:4]
    assert outcome.finish_reason is FinishReason.STOP
    assert outcome.stop_reason == text[4:7]
    assert len(outcome.token_ids) == len(outcome.logprobs) == 7
    assert [entry.token_id for entry in outcome.logprobs] == outcome.token_ids
    assert outcome.usage.completion_tokens == 7
    await cluster.settled()
    assert len(cluster["d0"].cancelled) == 1


async def test_characters_are_never_broken(cluster):
    data = "né🎉ñ".encode()
    cluster["d0"].tokens_of = lambda request, k: data[k]
    pieces = [d.text async for d in cluster.stream(cluster.input(SHORT, len(data)))]
    assert "".join(pieces) == "né🎉ñ"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


async def test_missing_seed_is_drawn_once_and_kept(cluster):
    outcome = await cluster.generate(LONG, 4, temperature=1.0)
    seeds = {r.sampling.seed for w in ("p0", "d0") for r in cluster[w].submitted}
    assert len(seeds) == 1 and None not in seeds
    assert len(outcome.token_ids) == 4
    await cluster.generate(LONG, 4, temperature=1.0, seed=7)
    assert cluster["p0"].submitted[-1].sampling.seed == 7
    await cluster.generate(LONG, 4)
    assert cluster["p0"].submitted[-1].sampling.seed is None


async def test_cache_salt_separates_block_hashes(cluster):
    await cluster.generate(LONG, 2, cache_salt="a")
    await cluster.generate(LONG, 2, cache_salt="b")
    first, second = cluster["p0"].submitted
    assert not set(first.block_hashes) & set(second.block_hashes)


async def test_unknown_model_and_too_long_prompt_are_refused_before_any_work(cluster):
    request = cluster.input(SHORT)
    with pytest.raises(ModelNotFound):
        await cluster.run(type(request)(**{**_fields(request), "model": "other"}))
    with pytest.raises(ContextLengthExceeded, match="4096"):
        await cluster.generate([1] * 4096)
    assert not cluster["d0"].submitted
    assert cluster.core.dispatcher.num_in_flight == 0


async def test_no_worker_is_an_error_after_a_bounded_wait(make_cluster):
    cluster = await make_cluster(0, 0)
    with pytest.raises(NoWorker):
        await asyncio.wait_for(cluster.generate(SHORT), 4)
    assert cluster.core.dispatcher.num_in_flight == 0


async def test_request_waits_for_a_worker_to_come(make_cluster):
    cluster = await make_cluster(1, 1)
    await cluster["p0"].kill()
    await cluster["d0"].kill()
    while any(not w.is_quarantined for w in cluster.core.pool.view().workers):
        await asyncio.sleep(0.01)
    waiting = asyncio.create_task(cluster.generate(SHORT, 4))
    await asyncio.sleep(0.1)
    await cluster["d0"].revive()
    cluster.assert_right(await asyncio.wait_for(waiting, 5), SHORT, 4)


async def test_same_request_id_twice_at_once_is_two_requests(cluster):
    request = cluster.input(LONG, 6)
    a, b = await asyncio.gather(cluster.run(request), cluster.run(request))
    cluster.assert_right(a, LONG, 6)
    cluster.assert_right(b, LONG, 6)


async def test_models_follow_the_live_workers(cluster):
    (card,) = cluster.core.dispatcher.models()
    assert card.name == "fake" and card.max_model_len == 4096 and card.created_s > 0
    await cluster["d0"].kill()
    await cluster["p0"].kill()
    while cluster.core.dispatcher.models():
        await asyncio.sleep(0.01)


async def test_one_log_line_and_histograms_per_request(cluster, caplog):
    with caplog.at_level(logging.INFO, logger="services.router.requests.request_log"):
        await cluster.generate(LONG, 5)
    (record,) = [r for r in caplog.records if r.name == "services.router.requests.request_log"]
    line = json.loads(JsonFormatter("router").format(record))
    assert line["finish_reason"] == "length" and line["completion_tokens"] == 5
    (placement,) = line["placements"]
    assert placement["kind"] == "remote_prefill" and placement["decode"] == "d0"
    assert {c["worker_id"] for c in placement["candidates"]} == {"p0", "d0"}
    assert line["request_queue_seconds"] == 0.5
    assert line["kv_transfer_bytes"] == 4096
    assert line["kv_transfer_exposed_seconds"] == 0.125 and line["kv_transfer_hidden_ratio"] == 0.5
    assert line["migrations"] == [] and placement["offer"] is None

    text = await cluster.rendered('baton_workers{role="decode"} 1.0')
    for sample in (
        'baton_time_to_first_token_seconds_count{model="fake"} 1.0',
        'baton_e2e_request_latency_seconds_count{model="fake"} 1.0',
        'baton_inter_token_latency_seconds_count{model="fake"} 4.0',
        'baton_request_prefill_seconds_sum{model="fake"} 0.5',
        'baton_request_decode_seconds_sum{model="fake"} 1.0',
        'baton_kv_transfer_bytes_sum{model="fake"} 4096.0',
        'baton_kv_transfer_exposed_seconds_sum{model="fake"} 0.125',
        'baton_kv_transfer_hidden_ratio_sum{model="fake"} 0.5',
        'baton_placements_total{kind="remote_prefill"} 1.0',
        'baton_requests_total{finish_reason="length",model="fake"} 1.0',
        'baton_prompt_tokens_total{model="fake"} 100.0',
        'baton_generation_tokens_total{model="fake"} 5.0',
        'baton_prefix_cache_hit_tokens_total{model="fake",role="prefill"} 16.0',
        'baton_workers{role="decode"} 1.0',
        "baton_requests_running 0.0",
    ):
        assert sample in text, sample


async def test_log_line_says_whose_cache_was_offered(cluster, caplog):
    layout = cluster["p0"].layout
    hashes = chain_hashes(root_hash(layout.fingerprint), LONG, 16)
    cluster["p0"].store(hashes[:1])
    cluster["d0"].store(hashes[:4])
    # Too busy to compute the rest itself.
    cluster["d0"].set_load(queued_prefill_tokens=300)
    async with asyncio.timeout(2):
        while cluster.core.pool.index.match(hashes).by_worker() != {"p0": 1, "d0": 4}:
            await asyncio.sleep(0.005)
    with caplog.at_level(logging.INFO, logger="services.router.requests.request_log"):
        await cluster.generate(LONG, 5)
    (record,) = [r for r in caplog.records if r.name == "services.router.requests.request_log"]
    (placement,) = json.loads(JsonFormatter("router").format(record))["placements"]
    assert placement["kind"] == "remote_prefill"
    assert placement["offer"] == {"source": "d0", "num_blocks": 4, "num_own_blocks": 1}


async def test_gauges_of_a_lost_worker_are_removed(cluster):
    await cluster.rendered('worker="d0"')
    await cluster["d0"].kill()
    await cluster.connected("p0")
    text = await cluster.rendered('baton_workers{role="decode"} 0.0')
    assert 'worker="d0"' not in text


def _fields(request):
    return {name: getattr(request, name) for name in request.__dataclass_fields__}
