"""Protobuf <-> `baton.core`, one pair of functions per noun. The only place that knows both.

`*_from_wire` raises InvalidRequest or ValueError on values that no peer of this version sends.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from baton.core.block import HASH_SCHEME, first_hash, join_hashes, split_hashes
from baton.core.errors import InvalidRequest
from baton.core.fabric import FabricCounters, FabricReport, LinkReport, TierName, TierReport
from baton.core.kv_layout import KvLayout
from baton.core.lifecycle import EngineUse, LifecycleEvent, Timeline, TransferStats
from baton.core.request import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    FinishReason,
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    TokenDelta,
    TokenLogprobs,
    Work,
    check_num_entries,
)
from baton.core.structured import StructuredKind, StructuredSpec
from baton.core.worker_info import Epoch, LoadReport, Role, WorkerId, WorkerInfo
from baton.rpc.v1 import worker_pb2 as pb

_WORK_TO_WIRE = {
    Work.GENERATE: pb.WORK_GENERATE,
    Work.PREFILL: pb.WORK_PREFILL,
    Work.DECODE: pb.WORK_DECODE,
    Work.TAKEOVER: pb.WORK_TAKEOVER,
}
_WORK_FROM_WIRE = {v: k for k, v in _WORK_TO_WIRE.items()}
_FINISH_TO_WIRE = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_FINISH_FROM_WIRE = {v: k for k, v in _FINISH_TO_WIRE.items()}
_ROLE_TO_WIRE = {Role.PREFILL: pb.ROLE_PREFILL, Role.DECODE: pb.ROLE_DECODE}
_ROLE_FROM_WIRE = {v: k for k, v in _ROLE_TO_WIRE.items()}
_STRUCTURED_TO_WIRE = {
    StructuredKind.JSON_SCHEMA: pb.STRUCTURED_KIND_JSON_SCHEMA,
    StructuredKind.JSON_OBJECT: pb.STRUCTURED_KIND_JSON_OBJECT,
    StructuredKind.REGEX: pb.STRUCTURED_KIND_REGEX,
    StructuredKind.CHOICE: pb.STRUCTURED_KIND_CHOICE,
    StructuredKind.GRAMMAR: pb.STRUCTURED_KIND_GRAMMAR,
}
_STRUCTURED_FROM_WIRE = {v: k for k, v in _STRUCTURED_TO_WIRE.items()}
_SCALAR_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
    "min_tokens",
    "prompt_logprobs",
)


def sampling_to_wire(sampling: SamplingParams) -> pb.SamplingParams:
    message = pb.SamplingParams(
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        bad_words=[pb.BadWord(token_ids=word) for word in sampling.bad_words_ids],
        allowed_token_ids=sampling.allowed_token_ids,
        include_stop_token=sampling.include_stop_token,
    )
    if sampling.structured is not None:
        message.structured.kind = _STRUCTURED_TO_WIRE[sampling.structured.kind]
        message.structured.text = sampling.structured.text
    for name in _SCALAR_SAMPLING:
        value = getattr(sampling, name)
        if value is not None:
            setattr(message, name, value)
    for token_id, bias in sampling.logit_bias:
        message.logit_bias[token_id] = bias
    return message


def sampling_from_wire(message: pb.SamplingParams, **defaults: Any) -> SamplingParams:
    """Fields the sender left out take `defaults`, then those of SamplingParams."""
    check_num_entries("stop_token_ids", len(message.stop_token_ids), MAX_STOP_TOKEN_IDS)
    check_num_entries("logit_bias", len(message.logit_bias), MAX_LOGIT_BIAS)
    check_num_entries("bad_words", len(message.bad_words), MAX_BAD_WORDS)
    check_num_entries("allowed_token_ids", len(message.allowed_token_ids), MAX_ALLOWED_TOKEN_IDS)
    values: dict[str, Any] = dict(defaults)
    values.update((n, getattr(message, n)) for n in _SCALAR_SAMPLING if message.HasField(n))
    return SamplingParams(
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        bad_words_ids=tuple(tuple(word.token_ids) for word in message.bad_words),
        allowed_token_ids=tuple(message.allowed_token_ids),
        include_stop_token=message.include_stop_token,
        structured=_structured_from_wire(message),
        **values,
    )


def _structured_from_wire(message: pb.SamplingParams) -> StructuredSpec | None:
    if not message.HasField("structured"):
        return None
    wire = message.structured
    if wire.kind not in _STRUCTURED_FROM_WIRE:
        raise InvalidRequest(
            f"structured output of kind {wire.kind} is unknown; see StructuredKind",
            param="structured",
        )
    return StructuredSpec(_STRUCTURED_FROM_WIRE[wire.kind], wire.text)


def finish_to_wire(reason: FinishReason | None) -> pb.FinishReason:
    return pb.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_TO_WIRE[reason]


def finish_from_wire(value: pb.FinishReason) -> FinishReason | None:
    return _FINISH_FROM_WIRE.get(value)


def request_to_wire(request: GenerateRequest) -> pb.Submit:
    message = pb.Submit(
        request_id=request.request_id,
        work=_WORK_TO_WIRE[request.work],
        prompt_token_ids=request.prompt_token_ids,
        block_hashes=join_hashes(request.block_hashes),
        output_token_ids=request.output_token_ids,
        eos_token_ids=request.eos_token_ids,
        sampling=sampling_to_wire(request.sampling),
        deadline_ms=max(1, int(request.deadline_s * 1000)),
    )
    if request.kv_source is not None:
        message.kv_source.CopyFrom(peer_to_wire(request.kv_source))
    return message


def peer_to_wire(peer: PeerRef) -> pb.PeerRef:
    return pb.PeerRef(worker_id=peer.worker_id, epoch=peer.epoch, address=peer.address)


def peer_from_wire(message: pb.PeerRef) -> PeerRef:
    return PeerRef(WorkerId(message.worker_id), Epoch(message.epoch), message.address)


def request_from_wire(message: pb.Submit) -> GenerateRequest:
    if message.work not in _WORK_FROM_WIRE:
        raise InvalidRequest(f"work {message.work} is unknown to this worker")
    return GenerateRequest(
        request_id=RequestId(message.request_id),
        work=_WORK_FROM_WIRE[message.work],
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_from_wire(message.sampling),
        block_hashes=tuple(split_hashes(message.block_hashes)),
        output_token_ids=tuple(message.output_token_ids),
        eos_token_ids=tuple(message.eos_token_ids),
        kv_source=peer_from_wire(message.kv_source) if message.HasField("kv_source") else None,
        deadline_s=message.deadline_ms / 1000,
    )


def logprobs_to_wire(entry: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top_token_ids=[token_id for token_id, _ in entry.top],
        top_logprobs=[logprob for _, logprob in entry.top],
    )


def logprobs_from_wire(message: pb.TokenLogprobs) -> TokenLogprobs:
    top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=True))
    return TokenLogprobs(message.token_id, message.logprob, top)


def timeline_to_wire(timeline: Timeline) -> pb.Timeline:
    t = timeline.transfer
    return pb.Timeline(
        points={int(event): at_s for event, at_s in timeline.points.items()},
        transfer=pb.TransferStats(
            num_bytes=t.num_bytes,
            num_blocks=t.num_blocks,
            num_reads=t.num_reads,
            seconds=t.seconds,
            exposed_seconds=t.exposed_seconds,
        ),
        engine=engine_use_to_wire(timeline.engine),
    )


def engine_use_to_wire(use: EngineUse) -> pb.EngineUse:
    return pb.EngineUse(seconds=use.seconds, num_steps=use.num_steps)


def engine_use_from_wire(message: pb.EngineUse) -> EngineUse:
    return EngineUse(message.seconds, message.num_steps)


def timeline_from_wire(message: pb.Timeline) -> Timeline:
    known = {int(event) for event in LifecycleEvent}
    t = message.transfer
    return Timeline(
        points={LifecycleEvent(k): v for k, v in message.points.items() if k in known},
        transfer=TransferStats(
            t.num_bytes, t.num_blocks, t.num_reads, t.seconds, t.exposed_seconds
        ),
        engine=engine_use_from_wire(message.engine),
    )


def delta_to_wire(delta: TokenDelta) -> pb.Delta:
    message = pb.Delta(
        request_id=delta.request_id,
        first_index=delta.first_index,
        token_ids=delta.token_ids,
        logprobs=[logprobs_to_wire(entry) for entry in delta.logprobs],
        finish_reason=finish_to_wire(delta.finish_reason),
        stop_token_id=delta.stop_token_id,
        error=delta.error,
        is_retryable=delta.is_retryable,
        is_overload=delta.is_overload,
        is_handed_back=delta.is_handed_back,
        num_cached_tokens=delta.num_cached_tokens,
        prompt_logprobs=[logprobs_to_wire(entry) for entry in delta.prompt_logprobs],
    )
    if delta.timeline is not None:
        message.timeline.CopyFrom(timeline_to_wire(delta.timeline))
    return message


def delta_from_wire(message: pb.Delta) -> TokenDelta:
    return TokenDelta(
        request_id=RequestId(message.request_id),
        first_index=message.first_index,
        token_ids=list(message.token_ids),
        logprobs=[logprobs_from_wire(entry) for entry in message.logprobs],
        finish_reason=finish_from_wire(message.finish_reason),
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        error=message.error,
        is_retryable=message.is_retryable,
        is_overload=message.is_overload,
        is_handed_back=message.is_handed_back,
        num_cached_tokens=message.num_cached_tokens,
        timeline=timeline_from_wire(message.timeline) if message.HasField("timeline") else None,
        prompt_logprobs=tuple(map(logprobs_from_wire, message.prompt_logprobs)),
    )


def layout_to_wire(layout: KvLayout) -> pb.KvLayout:
    return pb.KvLayout(
        model_id=layout.model_id,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        dtype=layout.dtype,
    )


def layout_from_wire(message: pb.KvLayout) -> KvLayout:
    return KvLayout(
        model_id=message.model_id,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        block_size=message.block_size,
        dtype=message.dtype,
    )


def worker_info_to_wire(info: WorkerInfo) -> pb.WorkerInfo:
    return pb.WorkerInfo(
        worker_id=info.worker_id,
        epoch=info.epoch,
        role=_ROLE_TO_WIRE[info.role],
        address=info.address,
        model_name=info.model_name,
        layout=layout_to_wire(info.layout),
        num_blocks=info.num_blocks,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        transport=info.transport,
        pid=info.pid,
        role_version=info.role_version,
    )


def worker_info_from_wire(message: pb.WorkerInfo) -> WorkerInfo:
    if message.role not in _ROLE_FROM_WIRE:
        raise ValueError(f"worker {message.worker_id} has unknown role {message.role}")
    return WorkerInfo(
        worker_id=WorkerId(message.worker_id),
        epoch=Epoch(message.epoch),
        role=_ROLE_FROM_WIRE[message.role],
        address=message.address,
        model_name=message.model_name,
        layout=layout_from_wire(message.layout),
        num_blocks=message.num_blocks,
        max_model_len=message.max_model_len,
        max_num_seqs=message.max_num_seqs,
        transport=message.transport,
        pid=message.pid,
        role_version=message.role_version,
    )


def role_to_wire(role: Role) -> pb.Role:
    return _ROLE_TO_WIRE[role]


def role_from_wire(role: pb.Role) -> Role:
    """Raises InvalidRequest."""
    if role not in _ROLE_FROM_WIRE:
        raise InvalidRequest(f"role {role} is unknown to this worker", param="role")
    return _ROLE_FROM_WIRE[role]


def hashing_to_wire(layout: KvLayout) -> pb.BlockHashing:
    """How this process names blocks of `layout`."""
    return pb.BlockHashing(
        scheme=HASH_SCHEME,
        block_size=layout.block_size,
        fingerprint=layout.fingerprint,
        first_hash=first_hash(layout.fingerprint, layout.block_size),
    )


_LOAD_FIELDS = tuple(LoadReport.__dataclass_fields__)


def load_to_wire(load: LoadReport) -> pb.LoadReport:
    return pb.LoadReport(**{name: getattr(load, name) for name in _LOAD_FIELDS})


def load_from_wire(message: pb.LoadReport) -> LoadReport:
    return LoadReport(**{name: getattr(message, name) for name in _LOAD_FIELDS})


def link_to_wire(link: LinkReport) -> pb.LinkReport:
    return pb.LinkReport(
        peer_id=link.peer_id,
        peer_epoch=link.peer_epoch,
        transport=link.transport,
        lane=link.lane,
        bytes_per_second=link.bytes_per_second,
        latency_seconds=link.latency_s,
        reason=link.reason,
    )


def link_from_wire(message: pb.LinkReport) -> LinkReport:
    return LinkReport(
        WorkerId(message.peer_id),
        Epoch(message.peer_epoch),
        message.transport,
        message.lane,
        message.bytes_per_second,
        message.latency_seconds,
        message.reason,
    )


def fabric_to_wire(report: FabricReport) -> pb.FabricReport:
    return pb.FabricReport(
        links=[link_to_wire(link) for link in report.links],
        tiers=[
            pb.TierReport(
                tier=tier.tier.value,
                num_blocks=tier.num_blocks,
                num_bytes=tier.num_bytes,
                max_bytes=tier.max_bytes,
                reason=tier.reason,
            )
            for tier in report.tiers
        ],
        counters=pb.FabricCounters(**asdict(report.counters)),
    )


def fabric_from_wire(message: pb.FabricReport) -> FabricReport:
    """Tiers that a newer worker may have and this version does not are left out."""
    known = {tier.value for tier in TierName}
    names = [each.name for each in fields(FabricCounters)]
    return FabricReport(
        tuple(link_from_wire(link) for link in message.links),
        tuple(
            TierReport(
                TierName(tier.tier), tier.num_blocks, tier.num_bytes, tier.max_bytes, tier.reason
            )
            for tier in message.tiers
            if tier.tier in known
        ),
        FabricCounters(**{name: getattr(message.counters, name) for name in names}),
    )
