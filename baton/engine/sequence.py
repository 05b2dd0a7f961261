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
from baton.core.request import GenerateRequest, RequestId, Work


class SequenceStatus(Enum):
    WAITING = "waiting"
    RESERVED = "reserved"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, weakref_slot=True)
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
    """Leading blocks that are complete and, with caching on, in the prefix cache."""
    num_announced_blocks: int = 0
    """PREFILL work: leading blocks that are leased and announced to the reader."""
    arrival_index: int = 0
    """Order of arrival at this engine; kept through preemption."""
    max_num_tokens: int = 0
    """Prompt and output together at which the sequence ends with LENGTH."""
    num_preemptions: int = 0
    has_started: bool = False
    """Has been in a batch since it arrived or since its KV arrived."""
    has_emitted: bool = False
    """A delta of this sequence has left the engine."""
    is_abandoned: bool = False
    """RESERVED and already ended for the client; its blocks wait for `activate` or `abandon`."""
    stop_ids: frozenset[int] = frozenset()
    """End-of-sequence ids that count, and the request's own stop ids."""
    status: SequenceStatus = SequenceStatus.WAITING
    timeline: Timeline = field(default_factory=Timeline)

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = [*self.request.prompt_token_ids, *self.request.output_token_ids]
            self.block_hashes = list(self.request.block_hashes)
        sampling = self.request.sampling
        eos_token_ids = () if sampling.ignore_eos else self.request.eos_token_ids
        self.stop_ids = frozenset((*eos_token_ids, *sampling.stop_token_ids))
        if not self.max_num_tokens:
            self.max_num_tokens = self.num_prompt_tokens + sampling.max_tokens

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def work(self) -> Work:
        return self.request.work

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
