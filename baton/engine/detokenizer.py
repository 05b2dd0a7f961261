"""Turn token ids into text while they arrive, without ever showing half a character.

A token is a piece of a byte string, and a character may be spread over several tokens. Where the
tokenizer's decoder is a plain concatenation of bytes (byte-level BPE, and SentencePiece models
with byte fallback) `ByteDetokenizer` keeps the few bytes of an unfinished character and nothing
else. Any other decoder goes through `WindowDetokenizer`, which decodes a short window twice.

Does not know: stop strings, requests, the network.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

MAX_PENDING_TOKENS = 8
"""A character has at most 4 bytes, so 4 byte tokens; twice that means the bytes are no text."""

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")

WINDOW_TOKENS = 5
"""Context of a window's decode; decoders look at the neighbouring token at most."""


class IncrementalDetokenizer(Protocol):
    """Text of one output sequence. Not shared between sequences."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain; may be empty, never ends inside a character."""
        ...

    def flush(self) -> str:
        """What was held back, at the end of the sequence; an unfinished character is U+FFFD."""
        ...


def _unknown_text(token_id: int) -> None:
    return None


class ByteDetokenizer:
    """For decoders that concatenate bytes. One dictionary look-up per token.

    `token_bytes` returns b"" for tokens that do not show. `prompt_ids` matter only when the
    prompt ends inside a character: its bytes then start the output. With `strips_space` the
    first space of a text is an artefact of the vocabulary and is dropped. `whole_text` may know
    the text of tokens that are whole characters, which saves decoding them.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        *,
        prompt_ids: Sequence[int] = (),
        strips_space: bool = False,
        whole_text: Callable[[int], str | None] = _unknown_text,
    ) -> None:
        self._token_bytes = token_bytes
        self._whole_text = whole_text
        self._decoder = _Utf8Decoder(errors="replace")
        self._is_between = True
        """No character is unfinished."""
        if prompt_ids and not whole_text(prompt_ids[-1]):
            self._decode(prompt_ids[-MAX_PENDING_TOKENS:])
        self._strips_space = strips_space and not any(map(token_bytes, reversed(prompt_ids)))

    def push(self, token_ids: Sequence[int]) -> str:
        if self._is_between and len(token_ids) == 1:
            text = self._whole_text(token_ids[0])
            if text is None:
                text = self._decode(token_ids)
        else:
            text = self._decode(token_ids)
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        text = self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))
        self._is_between = not self._decoder.getstate()[0]
        return text

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._is_between = True
        return text


class WindowDetokenizer:
    """For any decoder: the new text is decode(context + pending) beyond decode(context).

        ids   c c c c | p p        c: context, its text is shown; p: pending, not shown yet
                      ^ _num_context

    When the text ends in U+FFFD a character may be incomplete, so `p` waits, but for at most
    MAX_PENDING_TOKENS tokens. The tokens shown last are the next context, hence the window stays
    short. A token that adds no text is dropped: as context it would make the next piece look like
    the start of a text. (At the start it stays, as it may be the space that is to be stripped.)
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], *, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._ids = list(prompt_ids[-WINDOW_TOKENS:])
        self._num_context = len(self._ids)
        self._text = decode(self._ids)
        self._num_shown_chars = len(self._text.rstrip(REPLACEMENT))

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self._push_one, token_ids))

    def _push_one(self, token_id: int) -> str:
        num_pending = len(self._ids) - self._num_context
        text = self._decode([*self._ids, token_id])
        if text and text == self._text and not num_pending:
            return ""
        self._ids.append(token_id)
        self._text = text
        if text.endswith(REPLACEMENT) and num_pending + 1 < MAX_PENDING_TOKENS:
            return ""
        return self._show_pending()

    def flush(self) -> str:
        return self._show_pending() if len(self._ids) > self._num_context else ""

    def _show_pending(self) -> str:
        new_text = self._text[self._num_shown_chars :]
        del self._ids[: self._num_context]
        self._num_context = len(self._ids)
        self._text = self._decode(self._ids)
        self._num_shown_chars = len(self._text)
        return new_text
