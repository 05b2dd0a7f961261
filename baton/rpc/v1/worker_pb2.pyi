from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Work(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORK_UNSPECIFIED: _ClassVar[Work]
    WORK_GENERATE: _ClassVar[Work]
    WORK_PREFILL: _ClassVar[Work]
    WORK_DECODE: _ClassVar[Work]
    WORK_TAKEOVER: _ClassVar[Work]

class StructuredKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STRUCTURED_KIND_UNSPECIFIED: _ClassVar[StructuredKind]
    STRUCTURED_KIND_JSON_SCHEMA: _ClassVar[StructuredKind]
    STRUCTURED_KIND_JSON_OBJECT: _ClassVar[StructuredKind]
    STRUCTURED_KIND_REGEX: _ClassVar[StructuredKind]
    STRUCTURED_KIND_CHOICE: _ClassVar[StructuredKind]
    STRUCTURED_KIND_GRAMMAR: _ClassVar[StructuredKind]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
WORK_UNSPECIFIED: Work
WORK_GENERATE: Work
WORK_PREFILL: Work
WORK_DECODE: Work
WORK_TAKEOVER: Work
STRUCTURED_KIND_UNSPECIFIED: StructuredKind
STRUCTURED_KIND_JSON_SCHEMA: StructuredKind
STRUCTURED_KIND_JSON_OBJECT: StructuredKind
STRUCTURED_KIND_REGEX: StructuredKind
STRUCTURED_KIND_CHOICE: StructuredKind
STRUCTURED_KIND_GRAMMAR: StructuredKind
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_ERROR: FinishReason

class RouterMessage(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "peers")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submit: Submit
    cancel: Cancel
    peers: Peers
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., peers: _Optional[_Union[Peers, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id", "protocol_version")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    protocol_version: int
    def __init__(self, router_id: _Optional[str] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_id", "work", "prompt_token_ids", "block_hashes", "output_token_ids", "eos_token_ids", "sampling", "kv_source", "deadline_ms", "role_version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    KV_SOURCE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    ROLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    work: Work
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    block_hashes: bytes
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    kv_source: PeerRef
    deadline_ms: int
    role_version: int
    def __init__(self, request_id: _Optional[str] = ..., work: _Optional[_Union[Work, str]] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., block_hashes: _Optional[bytes] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., kv_source: _Optional[_Union[PeerRef, _Mapping]] = ..., deadline_ms: _Optional[int] = ..., role_version: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "logprobs", "stop_token_ids", "ignore_eos", "min_tokens", "bad_words", "allowed_token_ids", "prompt_logprobs", "include_stop_token", "structured")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    logprobs: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    min_tokens: int
    bad_words: _containers.RepeatedCompositeFieldContainer[BadWord]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_logprobs: int
    include_stop_token: bool
    structured: StructuredOutput
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ..., logprobs: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., min_tokens: _Optional[int] = ..., bad_words: _Optional[_Iterable[_Union[BadWord, _Mapping]]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., prompt_logprobs: _Optional[int] = ..., include_stop_token: bool = ..., structured: _Optional[_Union[StructuredOutput, _Mapping]] = ...) -> None: ...

class BadWord(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class StructuredOutput(_message.Message):
    __slots__ = ("kind", "text")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: StructuredKind
    text: str
    def __init__(self, kind: _Optional[_Union[StructuredKind, str]] = ..., text: _Optional[str] = ...) -> None: ...

class PeerRef(_message.Message):
    __slots__ = ("worker_id", "epoch", "address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: str
    address: str
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class Peers(_message.Message):
    __slots__ = ("peers",)
    PEERS_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[PeerRef]
    def __init__(self, peers: _Optional[_Iterable[_Union[PeerRef, _Mapping]]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("welcome", "step", "fabric", "info")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FABRIC_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    step: StepBatch
    fabric: FabricReport
    info: WorkerInfo
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., step: _Optional[_Union[StepBatch, _Mapping]] = ..., fabric: _Optional[_Union[FabricReport, _Mapping]] = ..., info: _Optional[_Union[WorkerInfo, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("info", "load", "kv_sequence", "cached_hashes", "host_hashes", "disk_hashes", "hashing", "num_left_out")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    KV_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CACHED_HASHES_FIELD_NUMBER: _ClassVar[int]
    HOST_HASHES_FIELD_NUMBER: _ClassVar[int]
    DISK_HASHES_FIELD_NUMBER: _ClassVar[int]
    HASHING_FIELD_NUMBER: _ClassVar[int]
    NUM_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    info: WorkerInfo
    load: LoadReport
    kv_sequence: int
    cached_hashes: bytes
    host_hashes: bytes
    disk_hashes: bytes
    hashing: BlockHashing
    num_left_out: int
    def __init__(self, info: _Optional[_Union[WorkerInfo, _Mapping]] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ..., kv_sequence: _Optional[int] = ..., cached_hashes: _Optional[bytes] = ..., host_hashes: _Optional[bytes] = ..., disk_hashes: _Optional[bytes] = ..., hashing: _Optional[_Union[BlockHashing, _Mapping]] = ..., num_left_out: _Optional[int] = ...) -> None: ...

class BlockHashing(_message.Message):
    __slots__ = ("scheme", "block_size", "fingerprint", "first_hash")
    SCHEME_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FIRST_HASH_FIELD_NUMBER: _ClassVar[int]
    scheme: str
    block_size: int
    fingerprint: str
    first_hash: bytes
    def __init__(self, scheme: _Optional[str] = ..., block_size: _Optional[int] = ..., fingerprint: _Optional[str] = ..., first_hash: _Optional[bytes] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ("check_integrity",)
    CHECK_INTEGRITY_FIELD_NUMBER: _ClassVar[int]
    check_integrity: bool
    def __init__(self, check_integrity: bool = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_ms",)
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    timeout_ms: int
    def __init__(self, timeout_ms: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_ended",)
    NUM_ENDED_FIELD_NUMBER: _ClassVar[int]
    num_ended: int
    def __init__(self, num_ended: _Optional[int] = ...) -> None: ...

class ChangeRoleRequest(_message.Message):
    __slots__ = ("role", "timeout_ms", "may_empty_pool")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    MAY_EMPTY_POOL_FIELD_NUMBER: _ClassVar[int]
    role: Role
    timeout_ms: int
    may_empty_pool: bool
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., timeout_ms: _Optional[int] = ..., may_empty_pool: bool = ...) -> None: ...

class ChangeRoleResponse(_message.Message):
    __slots__ = ("info", "seconds")
    INFO_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    info: WorkerInfo
    seconds: float
    def __init__(self, info: _Optional[_Union[WorkerInfo, _Mapping]] = ..., seconds: _Optional[float] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("model_id", "num_layers", "num_kv_heads", "head_dim", "block_size", "dtype")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    def __init__(self, model_id: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_size: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("worker_id", "epoch", "role", "address", "model_name", "layout", "num_blocks", "max_model_len", "max_num_seqs", "transport", "pid", "role_version")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ROLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: str
    role: Role
    address: str
    model_name: str
    layout: KvLayout
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    transport: str
    pid: int
    role_version: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., model_name: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., num_blocks: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., transport: _Optional[str] = ..., pid: _Optional[int] = ..., role_version: _Optional[int] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("num_running", "num_waiting", "queued_prefill_tokens", "resident_kv_tokens", "free_blocks", "cached_blocks", "total_blocks", "leases", "reservations", "quarantined_blocks", "num_preemptions", "is_draining", "is_unhealthy", "busy_seconds", "num_steps")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    IS_UNHEALTHY_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    queued_prefill_tokens: int
    resident_kv_tokens: int
    free_blocks: int
    cached_blocks: int
    total_blocks: int
    leases: int
    reservations: int
    quarantined_blocks: int
    num_preemptions: int
    is_draining: bool
    is_unhealthy: bool
    busy_seconds: float
    num_steps: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., queued_prefill_tokens: _Optional[int] = ..., resident_kv_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., leases: _Optional[int] = ..., reservations: _Optional[int] = ..., quarantined_blocks: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., is_draining: bool = ..., is_unhealthy: bool = ..., busy_seconds: _Optional[float] = ..., num_steps: _Optional[int] = ...) -> None: ...

class StepBatch(_message.Message):
    __slots__ = ("deltas", "load", "first_kv_sequence", "kv_events", "late_uses")
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    FIRST_KV_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KV_EVENTS_FIELD_NUMBER: _ClassVar[int]
    LATE_USES_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedCompositeFieldContainer[Delta]
    load: LoadReport
    first_kv_sequence: int
    kv_events: _containers.RepeatedCompositeFieldContainer[KvEvent]
    late_uses: _containers.RepeatedCompositeFieldContainer[LateUse]
    def __init__(self, deltas: _Optional[_Iterable[_Union[Delta, _Mapping]]] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ..., first_kv_sequence: _Optional[int] = ..., kv_events: _Optional[_Iterable[_Union[KvEvent, _Mapping]]] = ..., late_uses: _Optional[_Iterable[_Union[LateUse, _Mapping]]] = ...) -> None: ...

class LateUse(_message.Message):
    __slots__ = ("request_id", "use")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    USE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    use: EngineUse
    def __init__(self, request_id: _Optional[str] = ..., use: _Optional[_Union[EngineUse, _Mapping]] = ...) -> None: ...

class FabricReport(_message.Message):
    __slots__ = ("links", "tiers", "counters")
    LINKS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[LinkReport]
    tiers: _containers.RepeatedCompositeFieldContainer[TierReport]
    counters: FabricCounters
    def __init__(self, links: _Optional[_Iterable[_Union[LinkReport, _Mapping]]] = ..., tiers: _Optional[_Iterable[_Union[TierReport, _Mapping]]] = ..., counters: _Optional[_Union[FabricCounters, _Mapping]] = ...) -> None: ...

class LinkReport(_message.Message):
    __slots__ = ("peer_id", "peer_epoch", "transport", "lane", "bytes_per_second", "latency_seconds", "reason")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    LATENCY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    peer_epoch: str
    transport: str
    lane: str
    bytes_per_second: float
    latency_seconds: float
    reason: str
    def __init__(self, peer_id: _Optional[str] = ..., peer_epoch: _Optional[str] = ..., transport: _Optional[str] = ..., lane: _Optional[str] = ..., bytes_per_second: _Optional[float] = ..., latency_seconds: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class TierReport(_message.Message):
    __slots__ = ("tier", "num_blocks", "num_bytes", "max_bytes", "reason")
    TIER_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    tier: str
    num_blocks: int
    num_bytes: int
    max_bytes: int
    reason: str
    def __init__(self, tier: _Optional[str] = ..., num_blocks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class FabricCounters(_message.Message):
    __slots__ = ("reads", "read_bytes", "failed_reads", "expired_leases", "recycles", "refused_peers", "fetched_blocks", "saved_blocks", "restored_blocks", "corrupt_blocks", "takeovers", "failed_takeovers", "takeover_pause_seconds")
    READS_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAILED_READS_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_LEASES_FIELD_NUMBER: _ClassVar[int]
    RECYCLES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_PEERS_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SAVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TAKEOVERS_FIELD_NUMBER: _ClassVar[int]
    FAILED_TAKEOVERS_FIELD_NUMBER: _ClassVar[int]
    TAKEOVER_PAUSE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    reads: int
    read_bytes: int
    failed_reads: int
    expired_leases: int
    recycles: int
    refused_peers: int
    fetched_blocks: int
    saved_blocks: int
    restored_blocks: int
    corrupt_blocks: int
    takeovers: int
    failed_takeovers: int
    takeover_pause_seconds: float
    def __init__(self, reads: _Optional[int] = ..., read_bytes: _Optional[int] = ..., failed_reads: _Optional[int] = ..., expired_leases: _Optional[int] = ..., recycles: _Optional[int] = ..., refused_peers: _Optional[int] = ..., fetched_blocks: _Optional[int] = ..., saved_blocks: _Optional[int] = ..., restored_blocks: _Optional[int] = ..., corrupt_blocks: _Optional[int] = ..., takeovers: _Optional[int] = ..., failed_takeovers: _Optional[int] = ..., takeover_pause_seconds: _Optional[float] = ...) -> None: ...

class KvEvent(_message.Message):
    __slots__ = ("stored", "removed", "on_host", "on_disk")
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    ON_HOST_FIELD_NUMBER: _ClassVar[int]
    ON_DISK_FIELD_NUMBER: _ClassVar[int]
    stored: bytes
    removed: bytes
    on_host: bytes
    on_disk: bytes
    def __init__(self, stored: _Optional[bytes] = ..., removed: _Optional[bytes] = ..., on_host: _Optional[bytes] = ..., on_disk: _Optional[bytes] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("request_id", "first_index", "token_ids", "logprobs", "finish_reason", "stop_token_id", "error", "is_retryable", "num_cached_tokens", "timeline", "is_overload", "prompt_logprobs", "is_handed_back")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    IS_RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    IS_OVERLOAD_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    IS_HANDED_BACK_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    first_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    finish_reason: FinishReason
    stop_token_id: int
    error: str
    is_retryable: bool
    num_cached_tokens: int
    timeline: Timeline
    is_overload: bool
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    is_handed_back: bool
    def __init__(self, request_id: _Optional[str] = ..., first_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., error: _Optional[str] = ..., is_retryable: bool = ..., num_cached_tokens: _Optional[int] = ..., timeline: _Optional[_Union[Timeline, _Mapping]] = ..., is_overload: bool = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., is_handed_back: bool = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("token_id", "logprob", "top_token_ids", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Timeline(_message.Message):
    __slots__ = ("points", "transfer", "engine")
    class PointsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    POINTS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    points: _containers.ScalarMap[int, float]
    transfer: TransferStats
    engine: EngineUse
    def __init__(self, points: _Optional[_Mapping[int, float]] = ..., transfer: _Optional[_Union[TransferStats, _Mapping]] = ..., engine: _Optional[_Union[EngineUse, _Mapping]] = ...) -> None: ...

class EngineUse(_message.Message):
    __slots__ = ("seconds", "num_steps")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    num_steps: int
    def __init__(self, seconds: _Optional[float] = ..., num_steps: _Optional[int] = ...) -> None: ...

class TransferStats(_message.Message):
    __slots__ = ("num_bytes", "num_blocks", "num_reads", "seconds", "exposed_seconds")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_READS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    num_blocks: int
    num_reads: int
    seconds: float
    exposed_seconds: float
    def __init__(self, num_bytes: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_reads: _Optional[int] = ..., seconds: _Optional[float] = ..., exposed_seconds: _Optional[float] = ...) -> None: ...
