"""The bytes of a stream: what is written ahead of time and what is not are the same events."""

from __future__ import annotations

import orjson
import pytest

from baton.core.request import TokenLogprobs
from services.router.openai_api.chat_format import ChatFormat
from services.router.openai_api.completion_format import CompletionFormat
from services.router.openai_api.wire_format import Frame, Prompt
from services.router.requests.generation import GenerationDelta

TEXTS = ["", " the", 'a"b\\c', "\n\t\x00", "größe €🙂", "</script>", "x" * 5000, "\u2028"]
ROUTES = {
    ChatFormat: ("chat.completion.chunk", lambda text: {"delta": {"content": text}}),
    CompletionFormat: ("text_completion", lambda text: {"text": text}),
}


class Letters:
    """A tokenizer of single letters."""

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def detokenizer(self, prompt_ids=(), *, skip_special_tokens=True):
        return self

    def push(self, token_ids) -> str:
        return "".join(map(chr, token_ids))


def frame(*, usage: bool = False, num_top_logprobs: int | None = None) -> Frame:
    return Frame(
        "id-1",
        'model "x"',
        123,
        Letters(),  # type: ignore[arg-type]
        num_top_logprobs,
        usage,
        prompts=[Prompt((1, 2))] * 20,
    )


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_event_of_a_token_is_the_whole_object_in_its_order(route, include_usage):
    wire = route(frame(usage=include_usage))
    name, payload = ROUTES[route]
    for index in (0, 1, 12, 0):
        for text in TEXTS:
            choice = {"index": index, **payload(text), "logprobs": None, "finish_reason": None}
            event = {
                "id": "id-1",
                "object": name,
                "created": 123,
                "model": 'model "x"',
                "choices": [choice],
            }
            if include_usage:
                event["usage"] = None
            assert wire.text(index, text) == b"data: " + orjson.dumps(event) + b"\n\n"


@pytest.mark.parametrize("route", ROUTES)
def test_log_probabilities_change_nothing_else(route):
    plain, full = route(frame()), route(frame(num_top_logprobs=1))
    logprobs = (TokenLogprobs(97, -0.5, ((97, -0.5),)),)
    delta = GenerationDelta("a", (97,), logprobs)
    with_entries = orjson.loads(full.detailed(0, delta).removeprefix(b"data: "))
    without = orjson.loads(plain.text(0, "a").removeprefix(b"data: "))
    assert with_entries["choices"][0].pop("logprobs") and not without["choices"][0].pop("logprobs")
    assert with_entries == without
