"""Clients of a release that is updated under them, and what each of their streams has got.

Clients find routers as they do behind a Service: by a list of endpoints that others change.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx

JOIN_S = 120.0
Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stream:
    """One request and its answer."""

    prompt: Prompt
    text: str = ""
    failure: str = ""
    """Why it is not whole."""


def read_stream(url: str, model: str, prompt: Prompt, max_tokens: int) -> Stream:
    body = {
        "model": model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0,
        "stream": True, "ignore_eos": True,
    }  # fmt: skip
    text, is_whole = "", False
    try:
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, timeout=60, trust_env=False
        ) as answer:
            if answer.status_code != 200:
                return Stream(prompt, "", f"{answer.status_code} {answer.read()!r}")
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    is_whole = True
                elif data:
                    event = json.loads(data)
                    if "error" in event:
                        return Stream(prompt, text, str(event["error"]))
                    text += "".join(choice["text"] for choice in event["choices"])
    except httpx.HTTPError as error:
        return Stream(prompt, text, repr(error))
    return Stream(prompt, text, "" if is_whole else "the stream ended early")


@dataclass
class Clients:
    """So many at a time, each with one stream after the other, until `stop`."""

    endpoints: list[str]
    """URLs of routers that take new requests."""
    model: str
    prompts: Sequence[Prompt]
    num_clients: int
    max_tokens: int
    streams: list[Stream] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        for number in range(self.num_clients):
            thread = threading.Thread(target=self._run, args=(random.Random(number),), daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(JOIN_S)
            assert not thread.is_alive(), "a stream hangs"

    def _run(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            url, prompt = rng.choice(list(self.endpoints)), rng.choice(self.prompts)
            self.streams.append(read_stream(url, self.model, prompt, self.max_tokens))


def revisions_of(
    streams: Sequence[Stream], expected: Mapping[str, Mapping[Prompt, str]]
) -> list[str]:
    """Of each stream the revision whose text it is, from its first to its last token.

    Raises AssertionError for a stream that failed, or is no revision's.
    """
    found = []
    for stream in streams:
        assert not stream.failure, stream
        whose = [name for name, texts in expected.items() if texts[stream.prompt] == stream.text]
        assert len(whose) == 1, f"{stream} is the text of {whose or 'no revision alone'}"
        found.append(whose[0])
    return found
