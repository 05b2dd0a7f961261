"""What runs beside the requests of a router."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

import baton
from baton.core.lifecycle import EngineUse
from baton.rpc.convert import engine_use_to_wire
from baton.rpc.v1 import worker_pb2 as pb
from services.router.config import RouterConfig
from services.router.router_gauges import RouterGauges, open_metrics, tenant_labels
from services.router.telemetry_config import MetricsConfig
from services.router.tenants.tenants_config import TenantConfig, TenantsConfig

LONG = list(range(1, 101))


async def test_gauges_go_on_after_one_of_them_fails(cluster, monkeypatch, caplog):
    calls = []

    def fail() -> None:
        calls.append(None)
        raise ValueError("a defect")

    monkeypatch.setattr("services.router.router_gauges.PERIOD_S", 0.01)
    gauges = RouterGauges(
        cluster.core.metrics,
        view=cluster.core.pool.view,
        generator=cluster.core.dispatcher,
        others=(fail,),
    )
    gauges.start()
    async with asyncio.timeout(5):
        while len(calls) < 3:
            await asyncio.sleep(0.01)
    await gauges.stop()
    assert "gauges could not be updated" in caplog.text
    await cluster.settled()


async def test_router_says_whether_it_is_ready_and_how_late_its_loop_is(cluster):
    text = await cluster.rendered("baton_router_ready 1.0")
    assert "baton_router_loop_lag_seconds" in text
    await cluster["d0"].kill()
    await cluster.rendered("baton_router_ready 0.0", timeout_s=6)


async def test_tokens_and_waiting_are_counted_while_requests_run(cluster):
    cluster["d0"].step_s = 0.01
    stream = cluster.stream(cluster.input(LONG, 2000))
    for _ in range(5):
        await anext(stream)
    recorder = cluster.core.dispatcher._recorder
    recorder.update()
    text = cluster.core.metrics.render().decode()
    counted = float(text.split('baton_generation_tokens_total{model="fake"} ')[1].split()[0])
    assert counted >= 5
    assert 'baton_requests_waiting{model="fake"} 0.0' in text
    await stream.aclose()
    await cluster.settled()
    final = float(
        cluster.core.metrics.render().decode()
        .split('baton_generation_tokens_total{model="fake"} ')[1].split()[0]
    )  # fmt: skip
    assert final >= counted


async def test_request_that_waits_for_a_worker_is_shown_as_waiting(cluster):
    await cluster["p0"].kill()
    await cluster["d0"].kill()
    async with asyncio.timeout(5):
        while any(s.is_ready for s in cluster.core.pool.sessions()):
            await asyncio.sleep(0.01)
    task = asyncio.create_task(cluster.generate(LONG, 3))
    await asyncio.sleep(0.1)
    cluster.core.dispatcher._recorder.update()
    waiting = 'baton_requests_waiting{model="fake"} 1.0'
    assert waiting in cluster.core.metrics.render().decode()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    cluster.core.dispatcher._recorder.update()
    assert waiting not in cluster.core.metrics.render().decode()


async def test_cost_of_a_cancelled_request_is_charged_when_its_worker_tells_it(cluster):
    stream = cluster.stream(dataclasses.replace(cluster.input(LONG, 2000), tenant="leaver"))
    for _ in range(3):
        await anext(stream)
    await stream.aclose()
    await cluster.settled()
    (wire_id,) = cluster["d0"].cancelled
    use = engine_use_to_wire(EngineUse(1.5, 7))
    cluster["d0"].report(late_uses=[pb.LateUse(request_id=wire_id, use=use)])
    charged = 'baton_tenant_engine_seconds_total{role="decode",tenant="leaver"} 1.5'
    await cluster.rendered(charged)
    # A worker that ended by itself while the cancel was on its way tells it with its last delta.
    delta = pb.Delta(request_id=wire_id, timeline=pb.Timeline(engine=use))
    cluster["d0"].report(deltas=[delta, pb.Delta(request_id="unknown", timeline=delta.timeline)])
    await cluster.rendered(charged.replace("1.5", "3.0"))
    await cluster.settled()


async def test_cost_of_a_failed_placement_is_charged_too(make_cluster):
    cluster = await make_cluster(1, 2)
    faults = cluster["d0"].faults
    cluster["d1"].faults, faults.error_at, faults.errors_left = faults, 4, 1
    request = dataclasses.replace(cluster.input(LONG, 8), tenant="unlucky")
    cluster.assert_right(await cluster.run(request), LONG, 8)
    decode = [cluster["d0"], cluster["d1"]]
    wire_id = cluster["p0"].submitted[0].request_id
    failed = next(w for w in decode if any(r.request_id == wire_id for r in w.submitted))
    use = engine_use_to_wire(EngineUse(0.5, 3))
    failed.report(late_uses=[pb.LateUse(request_id=wire_id, use=use)])
    await cluster.rendered('baton_tenant_engine_seconds_total{role="decode",tenant="unlucky"} 0.5')
    await cluster.settled()


@pytest.mark.parametrize("wants_timing", [True, False])
async def test_last_delta_has_the_time_line_if_it_was_asked_for(cluster, wants_timing):
    request = dataclasses.replace(cluster.input(LONG, 6), wants_timing=wants_timing)
    *others, last = [delta async for delta in cluster.stream(request)]
    assert all(delta.timing is None for delta in others)
    assert (last.timing is not None) is wants_timing
    if last.timing is not None:
        assert last.timing.prefill.worker == "p0" and last.timing.prefill.queue_ms == 500.0
        assert last.timing.decode.worker == "d0" and last.timing.decode.decode_ms == 1000.0
        assert last.timing.transfer.num_bytes == 4096


def test_series_that_the_settings_name_are_there_from_the_start(config: RouterConfig):
    named = TenantsConfig(named={"acme": TenantConfig()})
    text = open_metrics(dataclasses.replace(config, tenants=named)).render().decode()
    assert 'baton_build_info{fingerprint="session-' in text
    assert f'version="{baton.__version__}"' in text
    for sample in (
        'baton_time_to_first_token_seconds_count{model="fake"} 0.0',
        'baton_goodput_requests_total{model="fake",slo_class="interactive"} 0.0',
        'baton_tenant_requests_total{tenant="acme"} 0.0',
        'baton_tenant_requests_total{tenant="anonymous"} 0.0',
        'vllm:num_requests_waiting{engine="router",model_name="fake",pool="router"} 0.0',
    ):
        assert sample in text, sample
    quiet = dataclasses.replace(config, metrics=MetricsConfig(vllm_names=False))
    assert "vllm:" not in open_metrics(quiet).render().decode()


def test_nobody_is_anonymous_where_keys_are_needed(config: RouterConfig, tmp_path):
    keys = TenantsConfig(keys_file=tmp_path / "keys")
    assert "anonymous" not in tenant_labels(dataclasses.replace(config, tenants=keys)).known
