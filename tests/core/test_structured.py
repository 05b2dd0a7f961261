"""What a structured output may ask for, before anybody looks at what it means."""

from __future__ import annotations

import pytest

from baton.core.errors import InvalidRequest
from baton.core.request import SamplingParams
from baton.core.structured import (
    MAX_CHOICES,
    MAX_STRUCTURED_BYTES,
    StructuredKind,
    StructuredSpec,
)


@pytest.mark.parametrize("kind", [k for k in StructuredKind if k is not StructuredKind.JSON_OBJECT])
def test_needs_a_text_within_bounds(kind: StructuredKind) -> None:
    StructuredSpec(kind, "x" * MAX_STRUCTURED_BYTES)
    for text in ("", "x" * (MAX_STRUCTURED_BYTES + 1), "é" * (MAX_STRUCTURED_BYTES // 2 + 1)):
        with pytest.raises(InvalidRequest) as caught:
            StructuredSpec(kind, text)
        assert caught.value.param == "structured"
    with pytest.raises(InvalidRequest, match="unpaired surrogate"):
        StructuredSpec(kind, "a\ud800")


def test_json_object_takes_none() -> None:
    StructuredSpec(StructuredKind.JSON_OBJECT)
    with pytest.raises(InvalidRequest, match="takes no text"):
        StructuredSpec(StructuredKind.JSON_OBJECT, "{}")


def test_choices_come_out_as_they_went_in() -> None:
    choices = ("a", '"', "\\", "\n", "größe", "\U0001f600")
    assert StructuredSpec.of_choices(choices).choices == choices
    for wrong in ((), ("a", ""), ("a",) * (MAX_CHOICES + 1)):
        with pytest.raises(InvalidRequest):
            StructuredSpec.of_choices(wrong)
    for text in ("a", "{}", "[1]", "[", "[" * 9000, '[""]', "[]"):
        with pytest.raises(InvalidRequest):
            _ = StructuredSpec(StructuredKind.CHOICE, text).choices


@pytest.mark.parametrize(
    ("name", "value"), [("ignore_eos", True), ("min_tokens", 1), ("allowed_token_ids", (1,))]
)
def test_what_contradicts_it_is_refused(name: str, value: object) -> None:
    spec = StructuredSpec(StructuredKind.JSON_OBJECT)
    with pytest.raises(InvalidRequest, match="cannot be combined") as caught:
        SamplingParams(structured=spec, **{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value", "param"),
    [
        ("bad_words_ids", ((),), "tokens of a bad word"),
        ("bad_words_ids", ((1,) * 65,), "tokens of a bad word"),
        ("bad_words_ids", ((1,),) * 257, "bad_words"),
        ("allowed_token_ids", (1,) * 65537, "allowed_token_ids"),
        ("prompt_logprobs", 21, "prompt_logprobs"),
        ("prompt_logprobs", -1, "prompt_logprobs"),
    ],
)
def test_other_limits_on_tokens_are_bounded(name: str, value: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == param
