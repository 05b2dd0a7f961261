from __future__ import annotations

import codecs
import random

import pytest

from services.router.requests.detokenize import StopMatcher, TextStage


class ByteDetokenizer:
    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids):
        return self._decoder.decode(bytes(token_ids))

    def flush(self):
        return self._decoder.decode(b"", final=True)


class PieceDetokenizer:
    """Ids index pieces of text."""

    def __init__(self, pieces):
        self._pieces = pieces

    def push(self, token_ids):
        return "".join(self._pieces[i] for i in token_ids)

    def flush(self):
        return ""


def naive_end(text, stops):
    """(text before the stop, stop): the first to end, the longest among those."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(pieces, stops, **kw):
    stage = TextStage(PieceDetokenizer(pieces), stops, **kw)
    shown = []
    for i in range(len(pieces)):
        step = stage.push([i])
        shown.append(step.text)
        if step.stop is not None:
            assert step.num_tokens == 1
            return "".join(shown), step.stop, i + 1
    step = stage.finish()
    return "".join(shown) + step.text, step.stop, len(pieces)


@pytest.mark.parametrize("seed", range(4))
def test_any_cut_into_tokens_gives_the_text_of_the_naive_scan(seed):
    rng = random.Random(seed)
    for _ in range(2000):
        text = "".join(rng.choice("ab🎉") for _ in range(rng.randrange(14)))
        stops = [
            "".join(rng.choice("ab🎉") for _ in range(rng.randrange(1, 5)))
            for _ in range(rng.randrange(1, 4))
        ]
        pieces = []
        rest = text
        while rest:
            cut = rng.randrange(0, 4)
            pieces.append(rest[:cut])
            rest = rest[cut:]
        shown, stop, _ = run(pieces, stops)
        assert (shown, stop) == naive_end(text, stops), (pieces, stops)


def test_only_what_may_become_a_stop_string_is_held_back():
    stage = TextStage(PieceDetokenizer(["hello ", "EN", "D", "x END", " never"]), ["END."])
    assert stage.push([0]).text == "hello "
    assert stage.push([1]).text == ""
    assert stage.push([2]).text == ""
    assert stage.push([3]).text == "ENDx "
    assert stage.finish().text == "END"


def test_tokens_after_the_stop_string_do_not_count():
    stage = TextStage(PieceDetokenizer(["a", "b", "c", "d"]), ["bc"])
    assert stage.push([0, 1, 2, 3]) == ("a", 3, "bc")


def test_stop_strings_before_min_tokens_do_not_count():
    assert run(["a", "b", "a", "b"], ["ab"], min_tokens=3) == ("ab", "ab", 4)
    assert run(["a", "b", "c"], ["ab"], min_tokens=2) == ("", "ab", 2)


def test_without_stop_strings_text_passes_at_once():
    stage = TextStage(ByteDetokenizer())
    data = "né🎉".encode()
    assert "".join(stage.push([b]).text for b in data) == "né🎉"
    assert stage.finish().text == ""


def test_unfinished_character_appears_at_the_end():
    stage = TextStage(ByteDetokenizer(), ["zz"])
    assert stage.push(list("é".encode()[:1])).text == ""
    assert stage.finish().text == "\N{REPLACEMENT CHARACTER}"


def test_stop_string_completed_by_the_flush():
    stage = TextStage(ByteDetokenizer(), ["a\N{REPLACEMENT CHARACTER}"])
    stage.push(list(b"a\xf0"))
    assert stage.finish() == ("", 0, "a\N{REPLACEMENT CHARACTER}")


def test_matcher_falls_back_to_the_longest_border():
    matcher = StopMatcher("aabaaa")
    ends = [i for i, c in enumerate("aabaabaaabaaa") if matcher.feed(c)]
    assert ends == [8, 12]


def test_long_periodic_stop_string_costs_little():
    stage = TextStage(PieceDetokenizer(["a" * 5000]), ["a" * 1000 + "b"])
    assert len(stage.push([0]).text) == 4000
    assert len(stage.finish().text) == 1000


def test_stop_string_may_be_a_part_of_the_text():
    for text in ("one END two", "one END"):
        stage = TextStage(ByteDetokenizer(), ["END", "ND"], includes_stop=True)
        step = stage.push(list(text.encode()))
        assert step.text == "one END"
        assert step.stop == "END"
