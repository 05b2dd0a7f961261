"""Texts of a wanted number of tokens, without the server's tokenizer.

A text is made of words drawn from a list by a name: equal names give equal words, so requests
share exactly the prefixes that they are meant to share. How many tokens a word is, and how many a
request has beyond its words (chat template, first token), is measured on the server
(`calibration.py`). All words have four letters, so the first is nearly constant: one token each in
vocabularies learned from English, five bytes each where tokens are bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

_WORDS = """
able area army baby ball band bank base bath bear beat been beer bell belt best bill bird boat boom
boss bowl bulk bush busy camp care cash cell chip coal coat cold come cook cope core cost dark date
days deep desk diet dish does done door down draw drew drop dual dust each earn ease east ever face
fact fail farm fate fear feed feel feet fell felt file fire five flow food form from fuel fund gave
gear gene give goal goes good grew grow half hand have head help here hero hire hole host hour huge
hung hunt hurt into iron item jack join jury just keen kick kill knew know lack laid lake lane last
lead life link live load loan logo long lost love luck main make male many mark mass mean meat meet
menu mere mile milk mill mind mine miss mood moon more much neck need news nick nine none nose note
only onto over paid pain park part pass past path pipe plug poll pool pure race rail real rent rest
rice rise road rock roof root rose rush said same sand seed seek seem sell send shop shot show shut
sign site size slow soil some sort soul spot star stop such sure tank tape term test they toll took
tool tour town tree true tune twin type unit upon user vary very view wall want wave weak week well
were what when wife wild wine wing with wood word work yard yeah year your zero
"""
WORDS = tuple(_WORDS.split())
"""256, so that one random byte draws one."""


class Piece(NamedTuple):
    """A stretch of a prompt. Equal names at equal places are equal stretches."""

    name: str
    num_tokens: int


class TokenCost(NamedTuple):
    """What the server counts for a prompt."""

    per_request: float = 0.0
    """Beyond the words."""
    per_word: float = 1.0

    def words_up_to(self, num_tokens: int) -> int:
        """Words of a prompt of that many tokens; at least one."""
        return max(1, round((num_tokens - self.per_request) / self.per_word))


def text_of(pieces: Iterable[Piece], cost: TokenCost) -> str:
    """Words of all pieces. Boundaries are rounded in the whole, not each, so nothing adds up."""
    parts: list[str] = []
    num_tokens = num_words = 0
    for piece in pieces:
        num_tokens += piece.num_tokens
        up_to = max(num_words, cost.words_up_to(num_tokens))
        parts.append(words(piece.name, up_to - num_words))
        num_words = up_to
    return " ".join(part for part in parts if part)


def words(name: str, number: int) -> str:
    drawn = random.Random(name).randbytes(number)
    return " ".join(map(WORDS.__getitem__, drawn))


def ids_of(pieces: Iterable[Piece], vocab_size: int) -> list[int]:
    """Token ids below `vocab_size`; the lowest eighth is left out, where special tokens lie."""
    lowest = vocab_size // 8
    ids: list[int] = []
    for piece in pieces:
        rng = random.Random(piece.name)
        ids += [lowest + int(rng.random() * (vocab_size - lowest)) for _ in range(piece.num_tokens)]
    return ids
