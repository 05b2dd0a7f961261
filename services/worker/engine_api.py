"""What the worker needs of an engine, and what it takes from it between and after steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.core.block import BlockHash, BlockId
from baton.core.request import GenerateRequest, RequestId, TokenDelta
from baton.core.worker_info import LoadReport
from baton.engine.engine import Reservation, StepOutput
from baton.engine.layer_notices import LayerSink
from services.worker.kv_events import KvEvent


class EngineApi(Protocol):
    """What the loop needs of `baton.engine.engine.Engine`; every call on the engine's thread."""

    @property
    def has_work(self) -> bool: ...
    @property
    def is_empty(self) -> bool: ...
    def tell_layers(self, sink: LayerSink) -> None: ...
    def submit(self, request: GenerateRequest) -> None: ...
    def activate(self, request_id: RequestId, first: TokenDelta) -> None: ...
    def abandon(self, request_id: RequestId, *, unsettled: Sequence[BlockId]) -> None: ...
    def recover(self, block_ids: Sequence[BlockId]) -> None: ...
    def release_lease(self, request_id: RequestId) -> None: ...
    def cancel(self, request_id: RequestId) -> None: ...
    def lease_prefix(
        self, lease_id: RequestId, hashes: Sequence[BlockHash]
    ) -> tuple[BlockId, ...]: ...
    def reserve_import(
        self, import_id: RequestId, hashes: Sequence[BlockHash]
    ) -> Reservation | None: ...
    def finish_import(self, import_id: RequestId, *, num_blocks: int) -> None: ...
    def abandon_import(self, import_id: RequestId, *, unsettled: Sequence[BlockId]) -> None: ...
    def start_handover(self, request_id: RequestId, *, num_known_tokens: int) -> None: ...
    def freeze(self, request_id: RequestId) -> None: ...
    def resume(self, request_id: RequestId) -> None: ...
    def finish_handover(self, request_id: RequestId) -> None: ...
    def take_unsaved(self, max_blocks: int) -> list[tuple[BlockHash, BlockId]]: ...
    def release_saved(self, block_ids: Sequence[BlockId], *, is_saved: bool) -> None: ...
    def step(self) -> StepOutput: ...
    def load(self) -> LoadReport: ...
    def is_cached(self, block_hash: BlockHash) -> bool: ...
    def cached_hashes(self) -> list[BlockHash]: ...
    def check_integrity(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """One engine step as the event loop sees it."""

    output: StepOutput
    load: LoadReport
    kv_sequence: int
    """Number of `kv_event`, else of the last one."""
    kv_event: KvEvent | None = None
    """What moved between the prefix cache and the tiers."""

    @property
    def has_kv_event(self) -> bool:
        return self.kv_event is not None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine between two steps."""

    load: LoadReport
    cached_hashes: list[BlockHash]
    kv_sequence: int
    """Last KV event contained in the hashes. Those that follow may repeat some of it."""
    is_empty: bool
    host_hashes: list[BlockHash] = field(default_factory=list)
    """Not in the prefix cache, but in the host tier."""
    disk_hashes: list[BlockHash] = field(default_factory=list)
    """In the disk tier alone."""
