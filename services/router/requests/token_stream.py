"""Join what several workers say about one request into one gapless token stream.

Output positions decide: a delta at the next position is taken, one from before it is trimmed (a
replay produces some tokens twice), one from after it waits (the decode worker may be heard before
the prefill worker).

Pure: knows positions and finish reasons, not workers, text or time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.core.request import FinishReason, TokenDelta, TokenLogprobs


@dataclass(slots=True)
class NewTokens:
    """Tokens that are next in line, and the end when it has been reached."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With output 0, if they were wanted."""


class TokenStream:
    """The output of one request so far. Feed it the deltas of one placement after the other."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        """All tokens handed on, position 0 first."""
        self._early: list[TokenDelta] = []

    @property
    def next_index(self) -> int:
        return len(self.token_ids)

    @property
    def is_waiting(self) -> bool:
        """Something is here that cannot be used before what precedes it."""
        return bool(self._early)

    def restart(self) -> None:
        """A new placement begins: what the old one left waiting is void."""
        self._early.clear()

    def extend(self, delta: TokenDelta) -> bool:
        """`push` in short: takes tokens that are next in line while nothing waits, and says so."""
        known = self.token_ids
        if self._early or delta.first_index != len(known):
            return False
        known += delta.token_ids
        return True

    def push(self, delta: TokenDelta) -> NewTokens:
        """The tokens that became next in line with `delta`."""
        if delta.first_index > len(self.token_ids):
            self._early.append(delta)
            return NewTokens()
        new = NewTokens()
        self._take(delta, new)
        while self._early and new.finish_reason is None:
            ready = [d for d in self._early if d.first_index <= len(self.token_ids)]
            if not ready:
                break
            for early in ready:
                self._early.remove(early)
                self._take(early, new)
        return new

    def _take(self, delta: TokenDelta, new: NewTokens) -> None:
        num_known = len(self.token_ids) - delta.first_index
        if num_known == 0:
            fresh, logprobs = delta.token_ids, delta.logprobs
        else:
            fresh, logprobs = delta.token_ids[num_known:], delta.logprobs[num_known:]
        if delta.prompt_logprobs and not self.token_ids:
            new.prompt_logprobs = delta.prompt_logprobs
        self.token_ids += fresh
        new.token_ids += fresh
        new.logprobs += logprobs
        if delta.finish_reason is not None:
            new.finish_reason = delta.finish_reason
            new.stop_token_id = delta.stop_token_id
