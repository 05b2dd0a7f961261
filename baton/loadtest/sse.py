"""Server-sent events as they arrive in pieces, and what an event of OpenAI's streams says.

Pure: bytes and times go in.
"""

from __future__ import annotations

from typing import Any

import orjson

from baton.loadtest.outcome import ErrorKind, Outcome

MAX_EVENT_BYTES = 16 << 20
_DONE = b"[DONE]"


class EventSplitter:
    """Bytes of a stream to the data of its events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """Events that `piece` completes. Raises ValueError when one grows without an end."""
        data = self._rest + piece if self._rest else piece
        if b"\r" in data:
            # A pair that the piece cuts in two is joined with the next one.
            held = b"\r" if data.endswith(b"\r") else b""
            data = data.removesuffix(b"\r").replace(b"\r\n", b"\n") + held
        *events, self._rest = data.split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of the stream is longer than {MAX_EVENT_BYTES} bytes")
        return [data for event in events if (data := _data(event))]


def _data(event: bytes) -> bytes:
    """The event's data lines, joined; comments and other fields are left out."""
    event = event.lstrip(b"\n")
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].lstrip(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


class StreamReader:
    """Reads one streamed answer of the chat or completions route into an outcome."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._splitter = EventSplitter()
        self._is_done = False

    def feed(self, at_s: float, piece: bytes) -> None:
        """What came at that time; what is wrong with it is noted in the outcome."""
        try:
            for data in self._splitter.feed(piece):
                if data == _DONE:
                    self._is_done = True
                else:
                    self._read(at_s, orjson.loads(data))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            self._outcome.fail(ErrorKind.MALFORMED, f"not an event of this API: {error!r}")

    def close(self, at_s: float) -> None:
        """The response ended then."""
        outcome = self._outcome
        if self._is_done or outcome.finish_reason:
            outcome.end(at_s)
        else:
            outcome.fail(ErrorKind.CUT_OFF, "the server closed the stream before its end")

    def _read(self, at_s: float, event: dict[str, Any]) -> None:
        if "error" in event:
            error = event["error"] or {}
            self._outcome.fail(
                ErrorKind.STREAM, str(error.get("message")), str(error.get("code") or "")
            )
            return
        for choice in event["choices"]:
            text = piece_of(choice)
            if text:
                self._outcome.note_text(at_s, text)
            self._outcome.finish_reason = choice.get("finish_reason") or self._outcome.finish_reason
        usage = event.get("usage")
        if usage:
            read_usage(usage, self._outcome)


def read_answer(at_s: float, body: bytes, outcome: Outcome) -> None:
    """A whole answer, which ended at that time."""
    try:
        answer = orjson.loads(body)
        for choice in answer["choices"]:
            if outcome.is_text_kept:
                outcome.text += piece_of(choice)
            outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
        read_usage(answer["usage"], outcome)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        outcome.fail(ErrorKind.MALFORMED, f"not an answer of this API: {error!r}")
        return
    outcome.end(at_s)


def piece_of(choice: dict[str, Any]) -> str:
    """Text of a choice in any of the shapes that have some; arguments of tools are text too."""
    text: str | None = choice.get("text")
    if text is not None:
        return text
    said = choice.get("delta") or choice.get("message") or {}
    text = said.get("content") or said.get("reasoning_content") or said.get("reasoning")
    if text:
        return str(text)
    calls = said.get("tool_calls") or ()
    return "".join((call.get("function") or {}).get("arguments") or "" for call in calls)


def read_usage(usage: dict[str, Any], outcome: Outcome) -> None:
    outcome.num_prompt_tokens = int(usage["prompt_tokens"])
    outcome.num_output_tokens = int(usage.get("completion_tokens") or 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if cached is not None:
        outcome.num_cached_tokens = int(cached)
