"""What the worker needs of an engine, and what it takes from it between and after steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.core.block import BlockHash, BlockId
from baton.core.request import GenerateRequest, RequestId, TokenDelta
from baton.core.worker_info import LoadReport
from baton.engine.engine import StepOutput


class EngineApi(Protocol):
    """What the loop needs of `baton.engine.engine.Engine`; every call on the engine's thread."""

    @property
    def has_work(self) -> bool: ...
    @property
    def is_empty(self) -> bool: ...
    def submit(self, request: GenerateRequest) -> None: ...
    def activate(self, request_id: RequestId, first: TokenDelta) -> None: ...
    def abandon(self, request_id: RequestId, *, unsettled: Sequence[BlockId]) -> None: ...
    def recover(self, block_ids: Sequence[BlockId]) -> None: ...
    def release_lease(self, request_id: RequestId) -> None: ...
    def cancel(self, request_id: RequestId) -> None: ...
    def step(self) -> StepOutput: ...
    def load(self) -> LoadReport: ...
    def cached_hashes(self) -> list[BlockHash]: ...
    def check_integrity(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """One engine step as the event loop sees it."""

    output: StepOutput
    load: LoadReport
    kv_sequence: int
    """Number of the KV event this step made (when it changed the prefix cache), else the last."""

    @property
    def has_kv_event(self) -> bool:
        return bool(self.output.stored or self.output.removed)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine between two steps."""

    load: LoadReport
    cached_hashes: list[BlockHash]
    kv_sequence: int
    """Last KV event contained in `cached_hashes`. Those that follow may repeat some of it."""
    is_empty: bool
