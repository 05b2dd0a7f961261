"""Prompts and limits, independent of a wire format."""

from __future__ import annotations

import threading

import pytest

from baton.core.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, NoWorker
from baton.core.request import SamplingParams
from services.router.edge.preprocess import (
    INLINE_CHARS,
    MAX_MESSAGES,
    Preprocessor,
    check_sampling,
    check_stop,
    output_tokens,
)
from services.router.requests.generation import ModelCard


@pytest.fixture
def preprocessor(generator):
    preprocessor = Preprocessor(generator)
    yield preprocessor
    preprocessor.close()


@pytest.fixture
def card(generator):
    return generator.models()[0]


class WatchedTokenizer:
    """Remembers which threads encode."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.threads: list[threading.Thread] = []

    def apply_chat_template(self, messages, **options):
        return self._tokenizer.apply_chat_template(messages, **options)

    def encode(self, text, *, add_special_tokens):
        self.threads.append(threading.current_thread())
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


async def test_long_texts_are_tokenized_in_a_thread(preprocessor, tokenizer):
    watched = WatchedTokenizer(tokenizer)
    card = ModelCard("tiny", 100_000, watched, 0)
    await preprocessor.text_prompt(card, "x" * INLINE_CHARS)
    await preprocessor.text_prompt(card, "x" * (INLINE_CHARS + 1))
    await preprocessor.chat_prompt(card, [{"role": "user", "content": "y" * (INLINE_CHARS + 1)}])
    is_main = [t is threading.main_thread() for t in watched.threads]
    assert is_main == [True, False, False]


async def test_many_short_messages_are_rendered_in_a_thread(preprocessor, tokenizer):
    watched = WatchedTokenizer(tokenizer)
    card = ModelCard("tiny", 100_000, watched, 0)
    for num_messages in (10, 1000):
        await preprocessor.chat_prompt(card, [{"role": "user", "content": ""}] * num_messages)
    assert [t is threading.main_thread() for t in watched.threads] == [True, False]


async def test_more_messages_than_fit_are_not_rendered(preprocessor, tokenizer):
    watched = WatchedTokenizer(tokenizer)
    messages = [{"role": "user", "content": ""}] * (MAX_MESSAGES + 1)
    with pytest.raises(ContextLengthExceeded, match="16 messages"):
        await preprocessor.chat_prompt(ModelCard("tiny", 16, watched, 0), messages[:16])
    with pytest.raises(InvalidRequest, match=f"at most {MAX_MESSAGES}"):
        await preprocessor.chat_prompt(ModelCard("tiny", 10**6, watched, 0), messages)
    assert not watched.threads


async def test_hopelessly_long_texts_are_not_tokenized_at_all(preprocessor, tokenizer):
    watched = WatchedTokenizer(tokenizer)
    card = ModelCard("tiny", 16, watched, 0)
    with pytest.raises(ContextLengthExceeded, match="characters"):
        await preprocessor.text_prompt(card, "x" * 100_000)
    assert not watched.threads


def test_model_choice(preprocessor, generator):
    assert preprocessor.model_card(None).name == preprocessor.model_card("tiny").name == "tiny"
    with pytest.raises(ModelNotFound, match="served here: tiny"):
        preprocessor.model_card("x" * 5000)
    generator.names = ("a", "b")
    with pytest.raises(InvalidRequest, match="a, b"):
        preprocessor.model_card("")
    generator.names = ()
    with pytest.raises(NoWorker):
        preprocessor.model_card("tiny")


@pytest.mark.parametrize(
    ("num_prompt", "asked", "default", "expected"),
    [
        (10, None, None, 246),
        (10, None, 16, 16),
        (250, None, 16, 6),
        (10, 246, 16, 246),
        (255, 1, 16, 1),
    ],
)
def test_output_tokens(card, num_prompt, asked, default, expected):
    assert output_tokens(card, num_prompt, asked, default) == expected


def test_output_beyond_the_context_names_the_room(card):
    with pytest.raises(ContextLengthExceeded, match="max_tokens <= 6"):
        output_tokens(card, 250, 7, 16)


def test_sampling_is_checked_against_the_vocabulary(card):
    assert check_sampling(card, SamplingParams(top_k=10**6)).top_k == 258
    unchanged = SamplingParams(top_k=3, stop_token_ids=(257,), logit_bias=((0, 1.0),))
    assert check_sampling(card, unchanged) is unchanged
    for bad in (SamplingParams(stop_token_ids=(258,)), SamplingParams(logit_bias=((-1, 1.0),))):
        with pytest.raises(InvalidRequest, match="0 to 257"):
            check_sampling(card, bad)


def test_stop_strings_are_limited():
    assert check_stop(["a", "b"]) == ("a", "b")
    for bad in ([""], ["x"] * 17, ["x" * 1025]):
        with pytest.raises(InvalidRequest, match="stop"):
            check_stop(bad)
