"""The text stage of one request: token ids to text, stop strings cut exactly.

A stop string is found however tokens and characters fall: each one is followed by a small
automaton (longest prefix matched so far), fed one character at a time, so the result does not
depend on how the text was cut into tokens. The match that *ends* first wins; of two that end
together, the longer. Text that may still become a stop string is held back.

Does not know: workers, indices, HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Detokenizer(Protocol):
    """What this file needs of an incremental detokenizer."""

    def push(self, token_ids: Sequence[int], /) -> str: ...

    def flush(self) -> str: ...


class TextStep(NamedTuple):
    """What some tokens added to the text."""

    text: str
    """Text that became certain."""
    num_tokens: int
    """How many of the pushed tokens belong to the output; the rest came after a stop string."""
    stop: str | None = None
    """The stop string that ended the output."""


class StopMatcher:
    """How much of one stop string the end of the text matches."""

    __slots__ = ("_fallback", "matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        # _fallback[k]: the longest proper prefix of `stop` that also ends stop[:k]
        fallback = [0] * (len(stop) + 1)
        k = 0
        for i in range(1, len(stop)):
            while k and stop[i] != stop[k]:
                k = fallback[k]
            k += stop[i] == stop[k]
            fallback[i + 1] = k
        self._fallback = fallback

    def feed(self, char: str) -> bool:
        """Take one more character; True when the text now ends with the stop string."""
        k = self.matched
        if k == len(self.stop):
            k = self._fallback[k]
        while k and char != self.stop[k]:
            k = self._fallback[k]
        self.matched = k + (char == self.stop[k])
        return self.matched == len(self.stop)


class TextStage:
    """Keeps its state over replays: only the tokens matter, not which worker made them."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        includes_stop: bool = False,
    ) -> None:
        """Stop strings that are complete before token number `min_tokens` do not count.
        `includes_stop`: the one that ends the output is shown."""
        self._includes_stop = includes_stop
        self._detokenizer = detokenizer
        self._matchers = [StopMatcher(s) for s in dict.fromkeys(stop) if s]
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""

    @property
    def is_plain(self) -> bool:
        """There are no stop strings to look for: `push_plain` does."""
        return not self._matchers

    def push_plain(self, token_ids: Sequence[int]) -> str:
        """`push` in short, where it can only be text."""
        return self._detokenizer.push(token_ids)

    def push(self, token_ids: Sequence[int]) -> TextStep:
        if not self._matchers:
            self._num_tokens += len(token_ids)
            return TextStep(self._detokenizer.push(token_ids), len(token_ids))
        shown: list[str] = []
        for used, token_id in enumerate(token_ids, start=1):
            self._num_tokens += 1
            text, stop = self._scan(self._detokenizer.push((token_id,)))
            shown.append(text)
            if stop is not None:
                return TextStep("".join(shown), used, stop)
        return TextStep("".join(shown), len(token_ids))

    def finish(self) -> TextStep:
        """The sequence has ended: show what was held back, unless it completes a stop string."""
        rest = self._detokenizer.flush()
        if not self._matchers:
            return TextStep(rest, 0)
        text, stop = self._scan(rest)
        if stop is None:
            text, self._held = text + self._held, ""
        return TextStep(text, 0, stop)

    def _scan(self, new_text: str) -> tuple[str, str | None]:
        """The text that is certain after `new_text`, and the stop string that ended it."""
        held = self._held + new_text
        for at, char in enumerate(new_text, start=len(self._held)):
            done = [m for m in self._matchers if m.feed(char)]
            if done and self._num_tokens >= self._min_tokens:
                longest = max(done, key=lambda m: len(m.stop))
                self._held = ""
                end = at + 1 if self._includes_stop else max(0, at + 1 - len(longest.stop))
                return held[:end], longest.stop
        hold = max(m.matched for m in self._matchers)
        certain = max(0, len(held) - hold)
        self._held = held[certain:]
        return held[:certain], None
