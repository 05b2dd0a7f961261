"""Conversations from lengths, traces and files, and when they begin."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from baton.core.errors import ConfigError
from baton.loadtest.conversation_files import read_conversations
from baton.loadtest.options import LoadOptions, Targets
from baton.loadtest.pacing import at_own_times, at_rate
from baton.loadtest.prompt_text import WORDS, Piece, TokenCost, ids_of, text_of
from baton.loadtest.workload import (
    Conversation,
    Fitting,
    MadeUp,
    SharedPrefixes,
    Turns,
    replayed,
)
from baton.simulator.arrivals import RequestLengths
from baton.simulator.trace_files import read_trace

PAIRS = (RequestLengths(100, 10), RequestLengths(2000, 1))


def taken(made: MadeUp, number: int, seed: int = 1) -> list[Conversation]:
    return list(islice(made.conversations(seed), number))


def test_equal_seeds_give_equal_conversations_and_lengths_stay_pairs() -> None:
    made = MadeUp(PAIRS)
    first = taken(made, 50)
    assert first == taken(made, 50)
    assert first != taken(made, 50, seed=2)
    lengths = {(c.turns[0].pieces[0].num_tokens, c.turns[0].num_output_tokens) for c in first}
    assert lengths == {(100, 10), (2000, 1)}


def test_spread_scale_and_cuts_bound_lengths() -> None:
    fitting = Fitting(scale=0.5, max_prompt_tokens=60, max_output_tokens=7)
    made = MadeUp((RequestLengths(100, 20),), spread=0.5, fitting=fitting)
    prompts = [c.turns[0].pieces[0].num_tokens for c in taken(made, 200)]
    assert min(prompts) < 35 and max(prompts) == 60
    assert {c.turns[0].num_output_tokens for c in taken(made, 200)} <= set(range(5, 8))


def test_turns_have_think_times_after_the_first() -> None:
    made = MadeUp(PAIRS, turns=Turns(2, 6, think_s=3.0))
    conversations = taken(made, 400)
    assert {len(c.turns) for c in conversations} == set(range(2, 7))
    assert all(c.turns[0].think_s == 0 for c in conversations)
    think = [t.think_s for c in conversations for t in c.turns[1:]]
    assert np.mean(think) == pytest.approx(3.0, rel=0.15)


@pytest.mark.parametrize("burstiness", [0.0, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_variation_asked_for(burstiness: float) -> None:
    paced = at_rate(taken(MadeUp(PAIRS), 8000), 20.0, burstiness, seed=5)
    times = [c.at_s or 0.0 for c in paced]
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.1)
    assert (gaps.std() / gaps.mean()) ** 2 == pytest.approx(burstiness, rel=0.25, abs=1e-6)


def test_a_mooncake_trace_shares_the_words_of_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 9, "hash_ids": [1, 2, 3]},
        {"timestamp": 4000, "input_length": 1300, "output_length": 5, "hash_ids": [1, 2, 9]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = read_trace(path, block_size=16)
    first, second = at_own_times(replayed(trace.arrivals, trace.block_size, Fitting(), 0), 2.0)
    assert (first.at_s, second.at_s) == (0.0, 2.0)
    texts = [text_of(c.turns[0].pieces, TokenCost()).split() for c in (first, second)]
    assert [len(t) for t in texts] == [1100, 1300]
    assert texts[0][:1024] == texts[1][:1024]
    assert texts[0][1024:] != texts[1][1024:1100]


def test_scaled_traces_share_as_much(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 1100, "output_length": 9, "hash_ids": [1, 2, 3]}
    path.write_text((json.dumps(row) + "\n") * 2)
    trace = read_trace(path, block_size=16)
    scaled = replayed(trace.arrivals, 512, Fitting(scale=0.1, max_output_tokens=3), 0)
    texts = [text_of(c.turns[0].pieces, TokenCost()).split() for c in scaled]
    assert [len(t) for t in texts] == [110, 110]
    assert texts[0][:102] == texts[1][:102] and texts[0] != texts[1]
    assert scaled[0].turns[0].num_output_tokens == 1


def test_tables_of_azure_and_burstgpt_come_at_their_times(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.6805900,396,109\n"
    )
    burst = tmp_path / "burst.csv"
    burst.write_text("Timestamp,Request tokens,Response tokens\n5,374,44\n7,396,109\n")
    for path in (azure, burst):
        trace = read_trace(path, block_size=512)
        made = at_own_times(replayed(trace.arrivals, 512, Fitting(), 0), 1.0)
        assert [c.at_s for c in made] == pytest.approx([0.0, 2.0])
        assert [sum(p.num_tokens for p in c.turns[0].pieces) for c in made] == [374, 396]
        assert [c.turns[0].num_output_tokens for c in made] == [44, 109]


def test_boundaries_of_pieces_do_not_add_up_to_errors() -> None:
    pieces = [Piece(str(i), 7) for i in range(100)]
    cost = TokenCost(per_request=9, per_word=5)
    assert len(text_of(pieces, cost).split()) == round((700 - 9) / 5)


def test_words_are_distinct_and_one_random_byte_each() -> None:
    assert len(set(WORDS)) == 256
    assert {len(word) for word in WORDS} == {4}


def test_token_ids_share_prefixes_too() -> None:
    pieces = [Piece("a", 5), Piece("b", 3)]
    assert ids_of(pieces, 1000)[:5] == ids_of([Piece("a", 5), Piece("c", 3)], 1000)[:5]
    assert all(125 <= i < 1000 for i in ids_of([Piece("a", 5000)], 1000))


def test_every_shape_of_a_prompts_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    rows = [
        {"prompt": "one", "output_tokens": 3},
        {"text": "two"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        {"turns": ["a", "b"], "max_tokens": 2},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [12, 34, 5, 6, 7],
    ]
    path.write_bytes(gzip.compress(b"\n".join(json.dumps(r).encode() for r in rows) + b"\n\n"))
    read = read_conversations(path, num_output_tokens=9, fitting=Fitting(), seed=0)
    assert [len(c.turns) for c in read] == [1, 1, 1, 2, 1, 2]
    assert [c.turns[0].num_output_tokens for c in read] == [3, 9, 9, 2, 9, 34]
    assert read[2].turns[0].messages[0] == ("system", "s")
    assert [t.pieces[0].num_tokens for t in read[5].turns] == [12, 5]
    some = read_conversations(path, num_output_tokens=9, fitting=Fitting(), seed=0, limit=2)
    assert len(some) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "has no prompts"),
        ("{}\n", "line 1 is not a prompt"),
        ('{"prompt": "x"}\nnonsense\n', "line 2 is not a prompt"),
        ('{"prompt": ""}\n', "a text that is not empty"),
        ('{"messages": []}\n', "has 0 turns"),
        ('{"messages": [{"role": "user"}]}\n', "line 1 is not a prompt"),
        ('{"prompt": "x", "max_tokens": -5}\n', None),
        ("[1]\n", "has 0 turns"),
        ('"text"\n', "line 1 is not a prompt"),
    ],
)
def test_a_bad_prompts_file_names_its_line(tmp_path: Path, content: str, says: str | None) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    if says is None:
        (one,) = read_conversations(path, num_output_tokens=9, fitting=Fitting(), seed=0)
        assert one.turns[0].num_output_tokens == 1
        return
    with pytest.raises(ConfigError, match=says):
        read_conversations(path, num_output_tokens=9, fitting=Fitting(), seed=0)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "p.jsonl.gz"
    broken.write_bytes(gzip.compress(b"x" * 100)[:15])
    for path in (tmp_path / "none.jsonl", tmp_path, broken):
        with pytest.raises(ConfigError, match="cannot read the prompts"):
            read_conversations(path, num_output_tokens=9, fitting=Fitting(), seed=0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LoadOptions(rate_per_s=0), "--rate must be between 0.0001 and 100000, got 0"),
        (lambda: LoadOptions(rate_per_s=float("nan")), "--rate must be between"),
        (lambda: LoadOptions(rate_per_s=1e9), "--rate must be between"),
        (lambda: LoadOptions(concurrency=0), "--concurrency must be between 1 and 16384, got 0"),
        (lambda: LoadOptions(num_requests=0), "--requests must be between"),
        (lambda: LoadOptions(duration_s=-1), "--duration must be between"),
        (lambda: LoadOptions(burstiness=-1), "--burstiness must be between"),
        (lambda: LoadOptions(concurrency=1, rate_per_s=1), "give one of them"),
        (lambda: Targets(share=1.5), "--share must be between 0 and 1, got 1.5"),
        (lambda: Targets(ttft_s=0), "--ttft must be between .* seconds, got 0"),
        (lambda: Turns(0, 1), "--turns takes"),
        (lambda: Turns(3, 2), "--turns takes"),
        (lambda: Turns(1, 2, -1), "--think must be between"),
        (lambda: SharedPrefixes(-1), "--prefix takes"),
        (lambda: Fitting(scale=0), "--scale-lengths must be above 0"),
        (lambda: Fitting(max_prompt_tokens=0), "--max-prompt must be at least 1, got 0"),
        (lambda: MadeUp(()), "no lengths"),
        (lambda: MadeUp(PAIRS, spread=1.0), "--spread must be"),
        (lambda: at_own_times([], 0), "--speed must be above 0"),
        (lambda: at_own_times(taken(MadeUp(PAIRS), 2), 1), "say --rate or --concurrency"),
    ],
)
def test_loads_that_cannot_be_are_refused_with_the_limit(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=says):
        make()
