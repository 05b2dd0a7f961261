"""Everything that crosses a process border comes out as it went in."""

import dataclasses

import pytest

from baton.core.block import BlockHash
from baton.core.errors import InvalidRequest
from baton.core.kv_layout import KvLayout
from baton.core.lifecycle import EngineUse, LifecycleEvent, Timeline, TransferStats
from baton.core.request import (
    FinishReason,
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    TokenDelta,
    TokenLogprobs,
    Work,
)
from baton.core.structured import StructuredKind, StructuredSpec
from baton.core.worker_info import Epoch, LoadReport, Role, WorkerId, WorkerInfo
from baton.rpc import convert
from baton.rpc.v1 import worker_pb2 as pb

SAMPLING = SamplingParams(
    max_tokens=7,
    temperature=0.5,
    top_p=0.25,
    top_k=3,
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=-1.0,
    frequency_penalty=0.5,
    logit_bias=((1, -100.0), (5, 2.5)),
    seed=-(2**63),
    logprobs=0,
    stop_token_ids=(4, 2),
    ignore_eos=True,
    min_tokens=2,
    bad_words_ids=((1,), (2, 3, 1)),
    allowed_token_ids=(9, 4, 2**32 - 1),
    prompt_logprobs=0,
    include_stop_token=True,
)
PEER = PeerRef(WorkerId("p"), Epoch("e"), "127.0.0.1:1")


STRUCTURED = [
    SamplingParams(structured=StructuredSpec(StructuredKind.JSON_OBJECT)),
    SamplingParams(structured=StructuredSpec.of_choices(("ja", "nein", "\u00e9"))),
    *(
        SamplingParams(structured=StructuredSpec(kind, "text"))
        for kind in StructuredKind
        if kind is not StructuredKind.JSON_OBJECT
    ),
]


@pytest.mark.parametrize(
    "sampling", [SAMPLING, SamplingParams(), SamplingParams(temperature=0), *STRUCTURED]
)
@pytest.mark.parametrize("work", list(Work))
def test_request(sampling, work):
    request = GenerateRequest(
        request_id=RequestId("r"),
        work=work,
        prompt_token_ids=(1, 2**32 - 1),
        sampling=sampling,
        block_hashes=(BlockHash(b"a" * 16), BlockHash(b"b" * 16)),
        output_token_ids=(3,),
        eos_token_ids=(2,),
        kv_source=PEER if work.reads_all_kv else None,
        deadline_s=1.5,
    )
    wire = pb.Submit.FromString(convert.request_to_wire(request).SerializeToString())
    assert convert.request_from_wire(wire) == request


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_delta(reason):
    delta = TokenDelta(
        request_id=RequestId("r"),
        first_index=3,
        token_ids=[1, 2],
        logprobs=[TokenLogprobs(1, -0.5, ((1, -0.5), (7, -2.0))), TokenLogprobs(2, -0.25)],
        finish_reason=reason,
        stop_token_id=0,
        error="e",
        is_retryable=True,
        is_overload=True,
        is_handed_back=True,
        num_cached_tokens=9,
        timeline=Timeline(
            {event: float(event) for event in LifecycleEvent},
            TransferStats(1, 2, 3, 0.5, 0.25),
            EngineUse(1.5, 4),
        ),
        prompt_logprobs=(TokenLogprobs(3, -0.75, ((3, -0.75),)), TokenLogprobs(4, -8.0)),
    )
    wire = pb.Delta.FromString(convert.delta_to_wire(delta).SerializeToString())
    assert convert.delta_from_wire(wire) == delta
    bare = TokenDelta(RequestId("r"))
    assert convert.delta_from_wire(convert.delta_to_wire(bare)) == bare


def test_unknown_time_points_of_a_newer_peer_are_left_out():
    wire = pb.Timeline(points={1: 2.0, 999: 3.0})
    assert convert.timeline_from_wire(wire).points == {LifecycleEvent.ARRIVED: 2.0}


@pytest.mark.parametrize("role", list(Role))
def test_worker_info(role):
    info = WorkerInfo(
        worker_id=WorkerId("w"),
        epoch=Epoch("e"),
        role=role,
        address="127.0.0.1:1",
        model_name="m",
        layout=KvLayout("id", 1, 2, 3, 4, "bfloat16"),
        num_blocks=5,
        max_model_len=6,
        max_num_seqs=7,
        transport="nixl",
        pid=8,
        role_version=9,
    )
    assert convert.worker_info_from_wire(convert.worker_info_to_wire(info)) == info


def test_worker_of_unknown_role_is_refused():
    with pytest.raises(ValueError, match="unknown role"):
        convert.worker_info_from_wire(pb.WorkerInfo(worker_id="w"))


def test_load_report():
    load = LoadReport(*range(1, 12), True, True, busy_seconds=2.5, num_steps=9)
    assert convert.load_from_wire(convert.load_to_wire(load)) == load


def test_work_of_a_newer_router_is_refused():
    with pytest.raises(InvalidRequest, match="work 9"):
        convert.request_from_wire(pb.Submit(request_id="r", work=9, prompt_token_ids=[1]))


def test_masses_of_sampling_entries_are_refused_before_they_are_copied():
    for name, fields in (
        ("stop_token_ids", {"stop_token_ids": range(300)}),
        ("logit_bias", {"logit_bias": dict.fromkeys(range(2000), 1.0)}),
    ):
        with pytest.raises(InvalidRequest, match=f"{name} takes at most"):
            convert.sampling_from_wire(pb.SamplingParams(**fields))


def test_no_sampling_parameter_is_left_behind():
    """Each field alone, in a value that is not its default, crosses the border."""
    default = SamplingParams()
    changed = {
        f.name: value
        for f in dataclasses.fields(SamplingParams)
        if (value := getattr(SAMPLING, f.name)) != getattr(default, f.name)
    }
    changed["structured"] = STRUCTURED[0].structured
    changed["min_tokens"] = 2
    assert changed.keys() == {f.name for f in dataclasses.fields(SamplingParams)}
    for name, value in changed.items():
        sampling = dataclasses.replace(default, **{name: value})
        assert convert.sampling_from_wire(convert.sampling_to_wire(sampling)) == sampling, name


def test_structured_output_of_a_newer_router_is_refused():
    wire = pb.SamplingParams(structured=pb.StructuredOutput(kind=9, text="x"))
    with pytest.raises(InvalidRequest, match="kind 9"):
        convert.sampling_from_wire(wire)
