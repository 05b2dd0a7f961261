"""The two incremental detokenizers on hand-made decoders."""

from __future__ import annotations

import random
from collections.abc import Sequence

from baton.engine.detokenizer import (
    MAX_PENDING_TOKENS,
    REPLACEMENT,
    ByteDetokenizer,
    WindowDetokenizer,
)


def one_byte(token_id: int) -> bytes:
    """Ids from 256 on show nothing."""
    return bytes([token_id]) if token_id < 256 else b""


def decode_bytes(token_ids: Sequence[int]) -> str:
    return b"".join(map(one_byte, token_ids)).decode(errors="replace")


class CountingDecode:
    """decode_bytes that remembers the longest input it saw."""

    def __init__(self) -> None:
        self.longest = 0

    def __call__(self, token_ids: Sequence[int]) -> str:
        self.longest = max(self.longest, len(token_ids))
        return decode_bytes(token_ids)


def test_unfinished_character_is_held_back_until_flush() -> None:
    for detokenizer in (ByteDetokenizer(one_byte), WindowDetokenizer(decode_bytes)):
        assert detokenizer.push(b"a\xe2\x82") == "a"
        assert detokenizer.flush() == REPLACEMENT
        assert detokenizer.flush() == ""


def test_flush_without_rest_is_empty() -> None:
    for detokenizer in (ByteDetokenizer(one_byte), WindowDetokenizer(decode_bytes)):
        assert detokenizer.flush() == ""
        assert detokenizer.push(b"done") == "done"
        assert detokenizer.flush() == ""


def test_prompt_that_ends_inside_a_character_is_completed() -> None:
    euro = "€".encode()
    for detokenizer in (
        ByteDetokenizer(one_byte, prompt_ids=b"price " + euro[:2]),
        WindowDetokenizer(decode_bytes, prompt_ids=b"price " + euro[:2]),
    ):
        assert detokenizer.push(euro[2:] + b"5") == "€5"


def test_prompt_text_is_not_repeated() -> None:
    for detokenizer in (
        ByteDetokenizer(one_byte, prompt_ids=b"question?"),
        WindowDetokenizer(decode_bytes, prompt_ids=b"question?"),
    ):
        assert detokenizer.push(b"answer") == "answer"


def test_random_bytes_stream_like_one_decode() -> None:
    rng = random.Random(2)
    for _ in range(500):
        ids = [rng.choice((rng.randrange(256), rng.randrange(0x80, 0xC0))) for _ in range(30)]
        detokenizer = ByteDetokenizer(one_byte)
        assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush() == decode_bytes(
            ids
        )


def test_no_piece_of_valid_text_holds_a_replacement_character() -> None:
    text = "añ€🙂" * 20
    for detokenizer in (ByteDetokenizer(one_byte), WindowDetokenizer(decode_bytes)):
        pieces = [detokenizer.push([byte]) for byte in text.encode()]
        assert not any(REPLACEMENT in piece for piece in pieces)
        assert "".join(pieces) + detokenizer.flush() == text


def test_window_stays_short_over_a_long_output() -> None:
    for data in ("añ€🙂" * 500).encode(), b"\xff" * 3000:
        decode = CountingDecode()
        detokenizer = WindowDetokenizer(decode, prompt_ids=list(b"p" * 1000))
        for byte in data:
            detokenizer.push([byte])
        assert decode.longest <= 2 * MAX_PENDING_TOKENS


def test_tokens_without_text_do_not_grow_the_window() -> None:
    decode = CountingDecode()
    detokenizer = WindowDetokenizer(decode)
    assert detokenizer.push(b"a") == "a"
    for _ in range(1000):
        assert detokenizer.push([300]) == ""
    assert detokenizer.push(b"b") == "b"
    assert decode.longest <= 3


def test_bytes_that_are_no_text_do_not_block_what_follows() -> None:
    for detokenizer in (ByteDetokenizer(one_byte), WindowDetokenizer(decode_bytes)):
        shown = detokenizer.push(b"\xff" * 50 + b"ok")
        assert shown == REPLACEMENT * 50 + "ok"


def test_only_the_first_space_of_a_text_is_stripped() -> None:
    first = ByteDetokenizer(one_byte, strips_space=True)
    assert first.push([300]) + first.push(b" ") + first.push(b" a b") == " a b"
    after_prompt = ByteDetokenizer(one_byte, prompt_ids=b"p", strips_space=True)
    assert after_prompt.push(b" a") == " a"
    after_hidden_prompt = ByteDetokenizer(one_byte, prompt_ids=[300], strips_space=True)
    assert after_hidden_prompt.push(b" a") == "a"
