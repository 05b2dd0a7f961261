"""Outputs as rows of blocks: the same whatever pieces the text comes in."""

from __future__ import annotations

import random

import pytest

from baton.core.request import TokenLogprobs
from services.router.openai_api.blocks import (
    Begun,
    Blocks,
    CallBlock,
    Ended,
    More,
    TextBlock,
    blocks_of,
)
from services.router.openai_api.tool_plan import NO_TOOLS, Choice, ToolPlan

AUTO = ToolPlan(choice=Choice.AUTO)
CALL = '<tool_call>\n{"name": "%s", "arguments": {"a": 1}}\n</tool_call>'
TEXTS = (
    "",
    "plain words",
    "before " + CALL % "f",
    CALL % "f" + "\n" + CALL % "g",
    "a" + CALL % "f" + "between" + CALL % "g" + "behind",
    "<tool_call>\nno call</tool_call>",
)


def shown(blocks) -> list[tuple[str, str]]:
    return [
        ("text", block.text)
        if isinstance(block, TextBlock)
        else (block.name, str(block.arguments_object()))
        for block in blocks
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_do_not_matter(text):
    whole = shown(blocks_of(AUTO, text))
    for seed in range(20):
        draw = random.Random(seed)
        blocks, events, rest = Blocks(AUTO), [], text
        while rest:
            cut = draw.randint(1, 9)
            events += blocks.push(rest[:cut])
            rest = rest[cut:]
        events += blocks.finish()
        assert shown(blocks.blocks) == whole
        check_order(events, blocks.blocks)


def check_order(events, blocks) -> None:
    """One block at a time, in the order of their numbers, each with what its events said."""
    is_open, number, said = None, 0, {}
    for event in events:
        match event:
            case Begun(block):
                assert is_open is None
                assert block.index == number
                is_open, number = block, number + 1
            case More(block, text):
                assert block is is_open
                said[block.index] = said.get(block.index, "") + text
            case Ended(block):
                assert block is is_open
                is_open = None
    assert is_open is None
    assert number == len(blocks)
    for block in blocks:
        assert "".join(block.parts) == said.get(block.index, "")


def test_calls_and_text_in_their_order():
    text = "a" + CALL % "f" + "b" + CALL % "g"
    assert shown(blocks_of(AUTO, text)) == [
        ("text", "a"),
        ("f", "{'a': 1}"),
        ("text", "b"),
        ("g", "{'a': 1}"),
    ]


def test_only_the_first_call_where_one_is_allowed():
    plan = ToolPlan(choice=Choice.AUTO, is_parallel=False)
    found = blocks_of(plan, CALL % "f" + CALL % "g")
    assert [b.name for b in found if isinstance(b, CallBlock)] == ["f"]


def test_an_empty_output_is_an_empty_text_if_asked():
    assert blocks_of(NO_TOOLS, "") == []
    assert shown(blocks_of(NO_TOOLS, "", at_least_one=True)) == [("text", "")]


def test_arguments_that_were_cut_off_are_no_object():
    plan = ToolPlan(choice=Choice.NAMED, name="f")
    (call,) = blocks_of(plan, '{"a": [1, ')
    assert isinstance(call, CallBlock)
    assert call.arguments == '{"a": [1, '
    assert call.arguments_object() == {}


def test_logprobs_wait_for_their_text():
    one, two, three = (TokenLogprobs(i, -0.5, ()) for i in range(3))
    blocks = Blocks(NO_TOOLS)
    assert blocks.push("", (one,)) == []
    _, more = blocks.push("ab", (two,))
    assert more.logprobs == [one, two]
    blocks.push("", (three,))
    blocks.finish()
    assert blocks.blocks[0].logprobs == [one, two, three]
