"""The mutable state of one request inside the engine. No torch, no clock.

WAITING ──► RUNNING ──► FINISHED            work GENERATE, PREFILL
   ▲           │
   └─preempted─┘
WAITING ──► RESERVED ──► RUNNING ──► ...    work DECODE: blocks held, KV on its way
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from baton.core.block import BlockHash, BlockId
from baton.core.lifecycle import Timeline
from baton.core.request import GenerateRequest, RequestId


class SequenceStatus(Enum):
    WAITING = "waiting"
    RESERVED = "reserved"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Compared by identity."""

    request: GenerateRequest
    token_ids: list[int] = field(default_factory=list)
    """Prompt followed by output."""
    num_computed_tokens: int = 0
    """Tokens whose KV is in `block_table`."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache at admission."""
    block_table: list[BlockId] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)
    """Hashes of the full blocks known so far; grows with the output."""
    num_committed_blocks: int = 0
    """Leading blocks that are already in the prefix cache under their hash."""
    status: SequenceStatus = SequenceStatus.WAITING
    timeline: Timeline = field(default_factory=Timeline)

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = [*self.request.prompt_token_ids, *self.request.output_token_ids]
            self.block_hashes = list(self.request.block_hashes)

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]
