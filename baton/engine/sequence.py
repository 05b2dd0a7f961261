"""The mutable state of one request inside the engine. No torch, no clock.

WAITING ──► RUNNING ──► [RETIRING ──►] FINISHED     work GENERATE, PREFILL
   ▲           │
   └─preempted─┘
WAITING ──► RESERVED ──► RUNNING ──► ...            work DECODE, TAKEOVER: blocks held, KV comes
                         RUNNING ◄──► FROZEN ──► FINISHED       being handed on, see `handover`

Steps are launched ahead of their results, so progress has three marks. Here one step samples token
8, another computes it and samples token 9; block_size is 4:

    tokens       0 . . . | 4 . . 7 | ? ?       token_ids ends at 7, num_pending_tokens is 2
    computed     x x x x | x x x x | x         num_computed_tokens counts what is launched
    in flight              . . . x | x         num_in_flight_tokens; before them all is settled
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from baton.core.block import BlockHash, BlockId
from baton.core.lifecycle import Timeline
from baton.core.request import GenerateRequest, RequestId, TokenLogprobs, Work

if TYPE_CHECKING:
    from baton.engine.grammar.token_grammar import TokenGrammar


class SequenceStatus(Enum):
    WAITING = "waiting"
    RESERVED = "reserved"
    RUNNING = "running"
    FROZEN = "frozen"
    """Holds its KV and computes nothing: another worker may be about to go on with it."""
    RETIRING = "retiring"
    """Ended for everybody else; a step in flight still writes to its blocks."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """Compared by identity."""

    request: GenerateRequest
    token_ids: list[int] = field(default_factory=list)
    """Prompt followed by output, as far as values are known."""
    num_computed_tokens: int = 0
    """Tokens whose KV is in `block_table` once the steps in flight are over."""
    num_in_flight_tokens: int = 0
    """The last of them, which steps in flight compute. Not 0: the blocks cannot change hands."""
    num_pending_tokens: int = 0
    """Tokens that steps in flight sample. They count as tokens, their values are unknown."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache at admission."""
    block_table: list[BlockId] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)
    """Hashes of the full blocks known so far; grows with the output."""
    num_committed_blocks: int = 0
    """Leading blocks that are complete and, with caching on, in the prefix cache."""
    num_announced_blocks: int = 0
    """Leading blocks that are leased and announced to a reader of this sequence."""
    fill_id: int = 0
    """Of the step that computes the last chunk, when readers follow it by layers."""
    arrival_index: int = 0
    """Order of arrival at this engine; kept through preemption."""
    max_num_tokens: int = 0
    """Prompt and output together at which the sequence ends with LENGTH."""
    num_preemptions: int = 0
    has_started: bool = False
    """Has been in a batch since it arrived or since its KV arrived."""
    has_emitted: bool = False
    """A delta of this sequence has left the engine."""
    is_freezing: bool = False
    """It is to stand still once all its tokens but the last are computed."""
    is_abandoned: bool = False
    """RESERVED and already ended for the client; its blocks wait for `activate` or `abandon`."""
    awaits_grammar: bool = False
    """Its grammar is being compiled: all its tokens but the last may be computed."""
    grammar: TokenGrammar | None = None
    """Of a structured output."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt tokens from the second on whose steps are over, until they are told."""
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
        """With the pending ones."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_settled_tokens(self) -> int:
        """Leading tokens whose KV is in memory, and that no step in flight writes."""
        return self.num_computed_tokens - self.num_in_flight_tokens

    @property
    def is_ending(self) -> bool:
        """A pending token is the last one, whatever it turns out to be."""
        if not self.num_pending_tokens:
            return False
        return self.request.work is Work.PREFILL or self.num_tokens >= self.max_num_tokens

    @property
    def num_tokens_to_compute(self) -> int:
        """Tokens that steps may be launched for now."""
        return self.num_tokens - self.num_computed_tokens - self.awaits_grammar

    @property
    def wants_prompt_logprobs(self) -> bool:
        """The whole prompt is to be computed here, for what the model thinks of its tokens."""
        request = self.request
        return (
            request.sampling.prompt_logprobs is not None
            and not request.work.reads_all_kv
            and not request.output_token_ids
            and not self.has_emitted
        )

    @property
    def may_go_on(self) -> bool:
        """Further steps may be launched for it, as far as it alone decides."""
        if self.awaits_grammar and self.num_tokens_to_compute <= 0:
            return False
        if self.is_freezing and self.num_computed_tokens >= self.num_tokens - 1:
            return False
        return not self.num_pending_tokens or not self.is_ending

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """With the pending ones: the output position of the token to be sampled next."""
        return self.num_tokens - len(self.request.prompt_token_ids)

    @property
    def num_known_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The known ones."""
        return self.token_ids[self.num_prompt_tokens :]
