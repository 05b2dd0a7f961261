"""Events in pieces, and what they say."""

from __future__ import annotations

import json
import random

import pytest

from baton.loadtest.outcome import ErrorKind, Outcome
from baton.loadtest.sse import EventSplitter, StreamReader, read_answer


def outcome() -> Outcome:
    return Outcome(0, lambda: 9.0, is_text_kept=True)


def chat(text: str | None, finish: str | None = None) -> bytes:
    event = {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
END = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_are_the_same_however_they_are_cut(newline: bytes) -> None:
    stream = b": hello\n\ndata: a\n\nevent: x\ndata: b\ndata:c\n\n\ndata: [DONE]\n\n"
    stream = stream.replace(b"\n", newline)
    rng = random.Random(1)
    for _ in range(300):
        splitter, found, rest = EventSplitter(), [], stream
        while rest:
            size = rng.randint(1, 9)
            found += splitter.feed(rest[:size])
            rest = rest[size:]
        assert found == [b"a", b"b\nc", b"[DONE]"]


def test_an_event_without_an_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.loadtest.sse.MAX_EVENT_BYTES", 100)
    splitter = EventSplitter()
    with pytest.raises(ValueError, match="longer than 100 bytes"):
        splitter.feed(b"data: " + b"x" * 200)


def test_tokens_have_the_time_of_the_read_that_brought_them() -> None:
    seen = outcome()
    reader = StreamReader(seen)
    reader.feed(1.0, chat(""))
    reader.feed(2.0, chat("a") + chat("b"))
    reader.feed(3.5, chat("c") + chat(None, "length"))
    reader.feed(4.0, END)
    reader.close(4.0)
    assert list(seen.token_times_s) == [2.0, 2.0, 3.5]
    assert (seen.text, seen.finish_reason) == ("abc", "length")
    assert (seen.num_prompt_tokens, seen.num_cached_tokens, seen.num_tokens) == (5, 4, 2)
    assert (seen.ttft_s, seen.itl_s, seen.e2e_s) == (2.0, 1.5, 4.0)


def test_a_stream_without_its_end_is_cut_off() -> None:
    seen = outcome()
    reader = StreamReader(seen)
    reader.feed(1.0, chat("a"))
    reader.close(2.0)
    assert seen.error is not None and seen.error.kind is ErrorKind.CUT_OFF
    assert not seen.is_ok


def test_an_error_inside_a_stream_stays_the_reason() -> None:
    seen = outcome()
    reader = StreamReader(seen)
    reader.feed(1.0, b'data: {"error": {"message": "lost", "code": 503}}\n\n' + END)
    reader.close(2.0)
    assert seen.error is not None
    assert (seen.error.label, seen.error.message) == ("stream_error 503", "lost")


@pytest.mark.parametrize(
    "piece",
    [
        b"data: [1]\n\n",
        b"data: {}\n\n",
        b"data: {x\n\n",
        b'data: {"choices": 3}\n\n',
        b'data: {"choices": [1]}\n\n',
        b'data: {"choices": [], "usage": {"prompt_tokens": "x"}}\n\n',
    ],
)
def test_what_is_no_event_of_the_api_is_an_error_of_the_request(piece: bytes) -> None:
    seen = outcome()
    StreamReader(seen).feed(1.0, piece)
    assert seen.error is not None and seen.error.kind is ErrorKind.MALFORMED


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"text": "t"}, "t"),
        ({"delta": {"content": "c"}}, "c"),
        ({"delta": {"reasoning_content": "r"}}, "r"),
        ({"delta": {"tool_calls": [{"function": {"arguments": '{"a'}}]}}, '{"a'),
        ({"delta": {}}, ""),
    ],
)
def test_text_is_found_in_every_shape(choice: dict[str, object], text: str) -> None:
    seen = outcome()
    StreamReader(seen).feed(1.0, b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
    assert seen.text == text
    assert len(seen.token_times_s) == (1 if text else 0)


def test_a_whole_answer_is_read_and_a_wrong_one_told() -> None:
    seen = outcome()
    message = {"message": {"content": "hi"}, "finish_reason": "stop"}
    read_answer(3.0, json.dumps({"choices": [message], "usage": USAGE}).encode(), seen)
    assert (seen.text, seen.finish_reason, seen.e2e_s) == ("hi", "stop", 3.0)
    wrong = outcome()
    read_answer(3.0, b'{"choices": []}', wrong)
    assert wrong.error is not None and "usage" in wrong.error.message


def test_whatever_comes_is_an_answer_or_an_error_of_the_request() -> None:
    stream = chat("a") + chat("b") + chat(None, "length") + END
    rng = random.Random(7)
    for _ in range(5000):
        damaged = bytearray(stream)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.choice(b'{}[]",:0nt\n\r x\xff')
        seen = outcome()
        reader = StreamReader(seen)
        at = rng.randrange(len(damaged))
        reader.feed(1.0, bytes(damaged[:at]))
        reader.feed(2.0, bytes(damaged[at:]))
        reader.close(3.0)
        assert seen.is_ok != (seen.error is not None)
        whole = outcome()
        read_answer(1.0, bytes(damaged), whole)
        assert whole.error is not None
