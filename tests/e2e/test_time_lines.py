"""Where the time of one request went: told to its client, and as a trace."""

from __future__ import annotations

import json
from typing import Any

import grpc

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from observed import MODEL, PROMPT, Observed
from trace_collector import ReceivedSpan

CLIENT_SPAN_ID = "00f067aa0ba902b7"
TRACE_ID, GRPC_TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "b" * 32
LAST_TRACE_ID, COUNTED_TRACE_ID = "c" * 32, "d" * 32


def check_timing(timing: dict[str, Any], observed: Observed) -> None:
    prefill, transfer, decode = timing["prefill"], timing["transfer"], timing["decode"]
    assert prefill["worker"] == observed.system.worker("prefill").worker_id
    assert decode["worker"] == observed.system.worker("decode").worker_id
    assert prefill["num_chunks"] >= 1 and prefill["compute_ms"] > 0 <= prefill["queue_ms"]
    assert transfer["num_bytes"] > 0 and transfer["num_reads"] > 0
    assert 0 <= transfer["exposed_ms"] <= transfer["ms"]
    assert decode["num_steps"] >= 11 and decode["decode_ms"] > 0 < decode["engine_ms"]
    assert 0 <= timing["placed_ms"] <= timing["ttft_ms"] <= timing["total_ms"]
    assert timing["num_failures"] == timing["num_moves"] == 0


def test_client_gets_its_time_line_on_request_and_not_otherwise(observed):
    asked = {"baton": {"timing": True}, "prompt": list(reversed(PROMPT)), "cache_salt": "timing"}
    timing = observed.complete(asked)["baton"]["timing"]
    check_timing(timing, observed)
    # 90 tokens in steps of at most 64.
    assert timing["prefill"]["num_chunks"] == 2 and timing["prefill"]["cached_tokens"] == 0
    assert "baton" not in observed.complete()
    assert "baton" not in observed.complete({"baton": {"timing": False}})


def test_stream_ends_with_the_time_line(observed):
    answer = observed.post({"baton": {"timing": True}, "stream": True}, {})
    chunks = [
        json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")
    ]
    ends = [c["choices"][0] for c in chunks if "baton" in c["choices"][0]]
    assert [end["finish_reason"] for end in ends] == ["length"]
    check_timing(ends[0]["baton"]["timing"], observed)


def test_every_choice_has_a_time_line_of_its_own(observed):
    asked = {"baton": {"timing": True}, "n": 2, "seed": 3, "temperature": 1}
    choices = observed.post(asked, {}).json()["choices"]
    timings = [choice["baton"]["timing"] for choice in choices]
    assert len(timings) == 2 and all(t["total_ms"] > 0 for t in timings)


def test_unknown_wish_is_refused_by_name(observed):
    answer = observed.post({"baton": {"timings": True}}, {})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "baton.timings"


def test_time_line_over_grpc(observed):
    with grpc.insecure_channel(f"127.0.0.1:{observed.system.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.CompletionRequest(
            model=MODEL,
            token_ids=inference_pb2.TokenIds(ids=PROMPT),
            sampling=worker_pb2.SamplingParams(max_tokens=12, ignore_eos=True),
            with_timing=True,
        )
        *others, last = stub.Generate(request, timeout=60)
    assert not any(delta.HasField("timing") for delta in others)
    timing = last.timing
    assert timing.prefill.worker_id == observed.system.worker("prefill").worker_id
    assert timing.transfer.num_bytes > 0 and timing.decode.num_steps >= 11
    assert 0 < timing.ttft_ms <= timing.total_ms


def spans_of(observed: Observed, trace_id: str) -> dict[str, ReceivedSpan]:
    observed.collector.wait_for(lambda c: len(c.trace(trace_id)) >= 6)
    spans = observed.collector.trace(trace_id)
    by_name = {s.name: s for s in spans}
    assert len(by_name) == len(spans), [s.name for s in spans]
    return by_name


def check_tree(observed: Observed, trace_id: str) -> None:
    by_name = spans_of(observed, trace_id)
    assert set(by_name) == {
        "request", "queue in router", "prefill queue", "prefill", "kv transfer", "decode",
    }  # fmt: skip
    root = by_name.pop("request")
    assert root.span.parent_span_id.hex() == CLIENT_SPAN_ID
    assert root.service == "baton-router" and root.span.kind == root.span.SPAN_KIND_SERVER
    assert root.attributes["gen_ai.usage.output_tokens"] == 12
    for child in by_name.values():
        assert child.span.parent_span_id == root.span.span_id
        assert root.span.start_time_unix_nano <= child.span.start_time_unix_nano
        assert child.span.start_time_unix_nano <= child.span.end_time_unix_nano
    where = {name: (s.service, s.instance) for name, s in by_name.items()}
    prefill = ("baton-prefill", observed.system.worker("prefill").worker_id)
    decode = ("baton-decode", observed.system.worker("decode").worker_id)
    assert where["prefill"] == where["prefill queue"] == prefill
    assert where["kv transfer"] == where["decode"] == decode
    transfer = by_name["kv transfer"].attributes
    assert transfer["baton.kv_bytes"] > 0 and transfer["baton.kv_reads"] > 0
    assert by_name["decode"].attributes["baton.engine_steps"] >= 11


def test_request_is_traced_below_the_span_of_its_client(observed):
    observed.complete({"prompt": PROMPT[::-1]}, traceparent=f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01")
    check_tree(observed, TRACE_ID)


def test_trace_of_a_grpc_call_comes_from_its_metadata(observed):
    with grpc.insecure_channel(f"127.0.0.1:{observed.system.grpc_port}") as channel:
        request = inference_pb2.CompletionRequest(
            model=MODEL,
            token_ids=inference_pb2.TokenIds(ids=PROMPT[5:]),
            sampling=worker_pb2.SamplingParams(max_tokens=12, ignore_eos=True),
        )
        metadata = [("traceparent", f"00-{GRPC_TRACE_ID}-{CLIENT_SPAN_ID}-01")]
        stub = inference_pb2_grpc.InferenceStub(channel)
        list(stub.Generate(request, timeout=60, metadata=metadata))
    check_tree(observed, GRPC_TRACE_ID)


def test_nobody_is_traced_who_has_not_asked(observed):
    observed.complete(traceparent=f"00-{'a' * 32}-{CLIENT_SPAN_ID}-00")
    observed.complete(traceparent=f"00-{'0' * 32}-{CLIENT_SPAN_ID}-01")
    observed.complete()
    # Spans are sent in order: what these would have caused is there before this one.
    observed.complete(traceparent=f"00-{LAST_TRACE_ID}-{CLIENT_SPAN_ID}-01")
    spans_of(observed, LAST_TRACE_ID)
    traced = {s.trace_id for s in observed.collector.spans}
    assert traced <= {TRACE_ID, GRPC_TRACE_ID, LAST_TRACE_ID, COUNTED_TRACE_ID}


def test_spans_are_counted(observed):
    observed.complete(traceparent=f"00-{COUNTED_TRACE_ID}-{CLIENT_SPAN_ID}-01")
    name = "baton_trace_spans_total"
    seen = observed.scrape_when(
        lambda s: s.value(name, result="exported") == len(observed.collector.spans) > 0
    )
    assert seen.value(name, result="dropped") == seen.value(name, result="failed") == 0


def test_nothing_has_leaked(observed):
    observed.system.assert_nothing_leaked()
    assert observed.scrape().value("baton_requests_running") == 0
