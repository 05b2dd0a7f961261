"""The bytes that one token stands for.

Vocabularies spell bytes in one of two ways, and the tokenizer's decoder says which:

* byte level: every byte is one printable character, e.g. a space is "Ġ";
* SentencePiece: text as it is, a space is "▁", and bytes without a piece are "<0xE2>".

Other decoders are not a concatenation of per-token bytes; for them there is no `ByteRule`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import tokenizers

SENTENCEPIECE_SPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class ByteSpelling(Enum):
    BYTE_LEVEL = "byte_level"
    SENTENCEPIECE = "sentencepiece"


@dataclass(frozen=True, slots=True)
class ByteRule:
    """How pieces of a vocabulary become bytes."""

    spelling: ByteSpelling
    strips_space: bool = False
    """The first space of a whole text is dropped: the encoder has put it there."""


def byte_rule(decoder: tokenizers.decoders.Decoder | None) -> ByteRule | None:
    """The rule equal to `decoder`, None when it is not a concatenation of bytes."""
    if decoder is None:
        return None
    spec = json.loads(decoder.__getstate__())
    steps: Sequence[Mapping[str, Any]] = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return ByteRule(ByteSpelling.BYTE_LEVEL)
    if "ByteFallback" not in kinds or not kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return None
    strips_space = False
    for step in steps:
        if step["type"] == "Replace":
            if step["pattern"] != {"String": SENTENCEPIECE_SPACE} or step["content"] != " ":
                return None
        elif step["type"] == "Strip":
            if (step["content"], step["start"], step["stop"]) != (" ", 1, 0):
                return None
            strips_space = True
    return ByteRule(ByteSpelling.SENTENCEPIECE, strips_space=strips_space)


class TokenBytes:
    """Call with an id, get its bytes; remembered per id, so at most one entry per token.

    Ids in `hidden_ids` and ids the vocabulary does not know are b"".
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        rule: ByteRule | None,
        *,
        hidden_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._backend = backend
        self._rule = rule
        self._alphabet = _byte_level_alphabet()
        self._known: dict[int, bytes] = dict.fromkeys(hidden_ids, b"")
        self._texts: dict[int, str | None] = {}

    def __call__(self, token_id: int) -> bytes:
        data = self._known.get(token_id)
        if data is None:
            data = self._look_up(token_id)
            self._known[token_id] = data
        return data

    def whole_text(self, token_id: int) -> str | None:
        """The bytes as text; None when they are none by themselves, as parts of a character."""
        try:
            return self._texts[token_id]
        except KeyError:
            pass
        try:
            text = self(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self._texts[token_id] = text
        return text

    def _look_up(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._rule is None:
            text: str = self._backend.decode([token_id], skip_special_tokens=False)
            return text.encode()
        if self._rule.spelling is ByteSpelling.SENTENCEPIECE:
            match = _BYTE_PIECE.fullmatch(piece)
            if match:
                return bytes([int(match[1], 16)])
            return str(piece).replace(SENTENCEPIECE_SPACE, " ").encode()
        try:
            return bytes([self._alphabet[char] for char in piece])
        except KeyError:
            # An added token: spelled as text, not in the byte alphabet.
            return str(piece).encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte: printable Latin-1 stands for itself, the other bytes follow from U+0100.

    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py (bytes_to_unicode)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet
