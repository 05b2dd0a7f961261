"""The state of one request in the router, and what its client gets of new tokens.

Pure but for the timer it holds: no waiting, no workers.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from baton.core.block import BlockHash, chain_hashes, root_hash
from baton.core.errors import BatonError
from baton.core.kv_layout import KvLayout
from baton.core.request import FinishReason, TokenDelta
from baton.core.worker_info import WorkerId
from services.router.admission.ticket import Ticket
from services.router.requests.attempt import Attempt, WorkOrder
from services.router.requests.detokenize import TextStage
from services.router.requests.generation import GenerationDelta, GenerationInput, Usage
from services.router.requests.request_log import RequestRecorder
from services.router.requests.request_record import RequestRecord
from services.router.requests.timing_report import timing_of
from services.router.requests.token_stream import NewTokens, TokenStream
from services.router.shared.state import QuotaGrant


@dataclass(slots=True, eq=False)
class Flight:
    """Lives from the dispatcher's acceptance of a request to its end, over all attempts."""

    request: GenerationInput
    order: WorkOrder
    text: TextStage
    record: RequestRecord
    deadline_at_s: float
    """On the event loop's clock."""
    stream: TokenStream = field(default_factory=TokenStream)
    attempt: Attempt | None = None
    model_id: str = ""
    """Revision of the model that the last attempt runs on; an answer never changes it."""
    avoid: set[WorkerId] = field(default_factory=set)
    full: set[WorkerId] = field(default_factory=set)
    """Those of them that refused because they had no room."""
    num_handed_back: int = 0
    """How often a worker that left its pool has given it back."""
    timer: asyncio.TimerHandle | None = None
    ticket: Ticket | None = None
    """Of admission; None until the request has come there."""
    grant: QuotaGrant | None = None
    """What it holds of its tenant's quota."""
    abort: BatonError | None = None
    """Set from outside: the deadline has passed or the router stops."""
    _hashes: dict[KvLayout, tuple[BlockHash, ...]] = field(default_factory=dict)

    @property
    def num_tokens_left(self) -> int:
        return self.order.sampling.max_tokens - self.stream.next_index

    def known_token_ids(self) -> tuple[int, ...]:
        """All tokens that have arrived, those included that the client has yet to read."""
        known = list(self.stream.token_ids)
        for arrival in self.attempt.mailbox.unread if self.attempt is not None else ():
            delta = arrival.delta
            if delta is not None and delta.first_index <= len(known):
                known += delta.token_ids[len(known) - delta.first_index :]
        return tuple(known)

    def block_hashes(self, layout: KvLayout) -> tuple[BlockHash, ...]:
        """Of the prompt's full blocks; computed once, since workers of a model are alike."""
        hashes = self._hashes.get(layout)
        if hashes is None:
            root = root_hash(layout.fingerprint, self.request.cache_salt)
            chain = chain_hashes(root, self.request.prompt_token_ids, layout.block_size)
            hashes = self._hashes[layout] = tuple(chain)
        return hashes

    def go_on(self, delta: TokenDelta, at_s: float, recorder: RequestRecorder) -> GenerationDelta:
        """`emit` in short, of tokens that the stream has been extended by."""
        token_ids = delta.token_ids
        text = self.text.push_plain(token_ids)
        recorder.tokens(self.record, len(token_ids), at_s)
        return GenerationDelta(text, tuple(token_ids), tuple(delta.logprobs))

    def emit(self, new: NewTokens, at_s: float, recorder: RequestRecorder) -> GenerationDelta:
        """What the client gets of `new`. Sets the record's finish reason when it is the end."""
        text, num_tokens, stop = self.text.push(new.token_ids)
        if new.finish_reason is not None and stop is None:
            tail = self.text.finish()
            text, stop = text + tail.text, tail.stop
        if num_tokens:
            recorder.tokens(self.record, num_tokens, at_s)
        if stop is None and new.finish_reason is None:
            return GenerationDelta(
                text,
                tuple(new.token_ids),
                tuple(new.logprobs),
                prompt_logprobs=new.prompt_logprobs,
            )
        self.record.finish_reason = new.finish_reason if stop is None else FinishReason.STOP
        return GenerationDelta(
            text,
            tuple(new.token_ids[:num_tokens]),
            tuple(new.logprobs[:num_tokens]),
            self.record.finish_reason,
            stop_reason=self._stop_token(new) if stop is None else stop,
            usage=Usage(
                prompt_tokens=self.record.num_prompt_tokens,
                completion_tokens=self.record.num_output_tokens,
                cached_tokens=self.record.num_cached_tokens or 0,
            ),
            timing=timing_of(self.record) if self.request.wants_timing else None,
            prompt_logprobs=new.prompt_logprobs,
        )

    def _stop_token(self, new: NewTokens) -> int | None:
        """The stop token the client asked for; the model's own end of sequence is not one."""
        order, token_id = self.order, new.stop_token_id
        if token_id not in order.sampling.stop_token_ids:
            return None
        is_eos = token_id in order.eos_token_ids and not order.sampling.ignore_eos
        return None if is_eos else token_id
