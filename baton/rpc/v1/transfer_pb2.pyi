from baton.rpc.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChallengeRequest(_message.Message):
    __slots__ = ("worker_id", "epoch")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: str
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[str] = ...) -> None: ...

class ChallengeReply(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class ConnectRequest(_message.Message):
    __slots__ = ("protocol_version", "card", "nonce", "challenge")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    card: bytes
    nonce: bytes
    challenge: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., card: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., challenge: _Optional[bytes] = ...) -> None: ...

class ConnectReply(_message.Message):
    __slots__ = ("card",)
    CARD_FIELD_NUMBER: _ClassVar[int]
    card: bytes
    def __init__(self, card: _Optional[bytes] = ...) -> None: ...

class MeasureRequest(_message.Message):
    __slots__ = ("peers", "num_rounds", "card", "challenge")
    PEERS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[_worker_pb2.PeerRef]
    num_rounds: int
    card: bytes
    challenge: bytes
    def __init__(self, peers: _Optional[_Iterable[_Union[_worker_pb2.PeerRef, _Mapping]]] = ..., num_rounds: _Optional[int] = ..., card: _Optional[bytes] = ..., challenge: _Optional[bytes] = ...) -> None: ...

class MeasureReply(_message.Message):
    __slots__ = ("links", "memory_bytes_per_second", "findings")
    LINKS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[_worker_pb2.LinkReport]
    memory_bytes_per_second: float
    findings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, links: _Optional[_Iterable[_Union[_worker_pb2.LinkReport, _Mapping]]] = ..., memory_bytes_per_second: _Optional[float] = ..., findings: _Optional[_Iterable[str]] = ...) -> None: ...

class ReaderMessage(_message.Message):
    __slots__ = ("hello", "watch", "renew", "complete", "give_up", "fetch_prefix", "takeover", "freeze", "layers_read")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WATCH_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    GIVE_UP_FIELD_NUMBER: _ClassVar[int]
    FETCH_PREFIX_FIELD_NUMBER: _ClassVar[int]
    TAKEOVER_FIELD_NUMBER: _ClassVar[int]
    FREEZE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_READ_FIELD_NUMBER: _ClassVar[int]
    hello: ReaderHello
    watch: Watch
    renew: Renew
    complete: Complete
    give_up: GiveUp
    fetch_prefix: FetchPrefix
    takeover: Takeover
    freeze: Freeze
    layers_read: LayersRead
    def __init__(self, hello: _Optional[_Union[ReaderHello, _Mapping]] = ..., watch: _Optional[_Union[Watch, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., complete: _Optional[_Union[Complete, _Mapping]] = ..., give_up: _Optional[_Union[GiveUp, _Mapping]] = ..., fetch_prefix: _Optional[_Union[FetchPrefix, _Mapping]] = ..., takeover: _Optional[_Union[Takeover, _Mapping]] = ..., freeze: _Optional[_Union[Freeze, _Mapping]] = ..., layers_read: _Optional[_Union[LayersRead, _Mapping]] = ...) -> None: ...

class ReaderHello(_message.Message):
    __slots__ = ("worker_id", "epoch")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: str
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[str] = ...) -> None: ...

class Watch(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    def __init__(self, lease_id: _Optional[str] = ...) -> None: ...

class Complete(_message.Message):
    __slots__ = ("lease_id", "epoch")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    epoch: str
    def __init__(self, lease_id: _Optional[str] = ..., epoch: _Optional[str] = ...) -> None: ...

class GiveUp(_message.Message):
    __slots__ = ("request_id", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class FetchPrefix(_message.Message):
    __slots__ = ("request_id", "block_hashes")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    block_hashes: bytes
    def __init__(self, request_id: _Optional[str] = ..., block_hashes: _Optional[bytes] = ...) -> None: ...

class Takeover(_message.Message):
    __slots__ = ("request_id", "num_known_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_KNOWN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    num_known_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., num_known_tokens: _Optional[int] = ...) -> None: ...

class Freeze(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class LayersRead(_message.Message):
    __slots__ = ("request_id", "fill_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FILL_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    fill_id: int
    def __init__(self, request_id: _Optional[str] = ..., fill_id: _Optional[int] = ...) -> None: ...

class OwnerMessage(_message.Message):
    __slots__ = ("chunk", "completed", "refused", "layers")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    chunk: ChunkReady
    completed: Completed
    refused: Refused
    layers: LayersReady
    def __init__(self, chunk: _Optional[_Union[ChunkReady, _Mapping]] = ..., completed: _Optional[_Union[Completed, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., layers: _Optional[_Union[LayersReady, _Mapping]] = ...) -> None: ...

class ChunkReady(_message.Message):
    __slots__ = ("request_id", "lease_id", "epoch", "lease_ms", "first_block_index", "block_ids", "is_last", "first_token", "fill_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FILL_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    lease_id: str
    epoch: str
    lease_ms: int
    first_block_index: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    is_last: bool
    first_token: _worker_pb2.Delta
    fill_id: int
    def __init__(self, request_id: _Optional[str] = ..., lease_id: _Optional[str] = ..., epoch: _Optional[str] = ..., lease_ms: _Optional[int] = ..., first_block_index: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., is_last: bool = ..., first_token: _Optional[_Union[_worker_pb2.Delta, _Mapping]] = ..., fill_id: _Optional[int] = ...) -> None: ...

class LayersReady(_message.Message):
    __slots__ = ("request_id", "fill_id", "first_block_index", "block_ids", "num_layers")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FILL_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    fill_id: int
    first_block_index: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    num_layers: int
    def __init__(self, request_id: _Optional[str] = ..., fill_id: _Optional[int] = ..., first_block_index: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., num_layers: _Optional[int] = ...) -> None: ...

class Completed(_message.Message):
    __slots__ = ("lease_id", "valid")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    VALID_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    valid: bool
    def __init__(self, lease_id: _Optional[str] = ..., valid: bool = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("request_id", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
