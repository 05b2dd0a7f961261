"""Published formats of traces are read, and what is none is refused with its line."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from baton.simulator.trace_files import read_trace


def written(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


HEAD = "timestamp,input_length,output_length\n"


def line(**changes: object) -> str:
    """Of a Mooncake trace."""
    row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0]}
    return json.dumps(row | changes)


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
BURST_GPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
"""
PLAIN = "timestamp_s,input_length,output_length\n1.5,10,3\n7.5,40,2\n"


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize(
    ("text", "times", "lengths"),
    [
        (AZURE, [0.0, 4.314579], [(374, 44), (396, 109)]),
        (BURST_GPT, [0.0, 40.0], [(472, 18), (1087, 1)]),
        (PLAIN, [0.0, 6.0], [(10, 3), (40, 2)]),
    ],
)
def test_tables_with_times_are_arrivals(
    tmp_path: Path,
    suffix: str,
    text: str,
    times: list[float],
    lengths: list[tuple[int, int]],
) -> None:
    trace = read_trace(written(tmp_path / f"t{suffix}", text), block_size=16)
    assert [a.at_s for a in trace.arrivals] == pytest.approx(times, abs=1e-5)
    assert [(a.num_prompt_tokens, a.num_output_tokens) for a in trace.arrivals] == lengths
    assert [len(a.block_hashes) for a in trace.arrivals] == [n // 16 for n, _ in lengths]
    assert not trace.lengths


def test_a_table_without_times_is_lengths(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "input_length,output_length\n3772,54\n2015,156\n9,9\n")
    trace = read_trace(path, block_size=64, limit=2)
    assert [(p.num_prompt_tokens, p.num_output_tokens) for p in trace.lengths] == [
        (3772, 54),
        (2015, 156),
    ]
    assert not trace.arrivals


def test_a_mooncake_trace_keeps_its_shared_prefixes(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 3000, "input_length": 1024, "output_length": 5, "hash_ids": [0, 1]},
    ]
    text = "\n".join(map(json.dumps, rows))
    trace = read_trace(written(tmp_path / "t.jsonl", text), block_size=16)
    assert trace.block_size == 512
    assert trace.arrivals[0].block_hashes == trace.arrivals[1].block_hashes


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "", "no columns of lengths"),
        ("a.csv", "input_length,output_length\n", "has no requests"),
        ("a.csv", "input_length,when\n1,2\n", "no columns of lengths"),
        ("a.csv", "input_length,output_length\n5,7\nx,7\n", "line 3 is not a request"),
        ("a.csv", "timestamp,input_length,output_length\nlate,1,2\n", "line 2 is not a request"),
        ("a.csv", "input_length,output_length\n5\n", "line 2 is not a request"),
        ("a.jsonl", "", "has no requests"),
        ("a.jsonl", "{}\n", "line 1 is not a request"),
        ("a.csv", "input_length,output_length\n5,-7\n", "line 2 .* from 0 to 10000000 .* got -7"),
        (
            "a.csv",
            "input_length,output_length\n5,nan\n",
            "line 2 .* finite number, got nan; correct",
        ),
        ("a.csv", "input_length,output_length\n5,inf\n", "line 2 .* finite number, got inf"),
        ("a.csv", "input_length,output_length\n5,1e9\n", "line 2 .* got 1e9; correct or remove"),
        (
            "a.csv",
            "input_length,output_length\n5.5,1\n",
            "line 2 .* whole number of tokens, got 5.5",
        ),
        ("a.csv", "input_length,output_length\n5,7\n,\n", "line 3 .* input_length is missing"),
        ("a.csv", f"{HEAD}1,5,7\nnan,5,7\n", "line 3 .* timestamp must be a finite number"),
        ("a.csv", f"{HEAD}-1,5,7\n", "line 2 .* timestamp must be from 0 .* got -1"),
        ("a.csv", f"{HEAD}9,5,7\n2,5,7\n", "line 3 .* 7 s before .* sort the file by time"),
        ("a.csv", f"{HEAD}2023-11-16 18:15:50,5,7\n2023-11-16 18:15:46,5,7\n", "line 3 .* 4 s bef"),
        ("a.csv", f"{HEAD}2023-31-16 18:15:50,5,7\n", "line 2 is not a request"),
        ("a.csv", "input_length,output_length\n5,\0\n", "line 2 .* must be a number|not a table"),
        ("a.jsonl", line() + "\n\n" + line(), "line 2 is not a request: it is empty"),
        ("a.jsonl", "[" * 100_000, "line 1 is not a request"),
        ("a.jsonl", "7\n", "line 1 .* it is no object but '7'"),
        ("a.jsonl", line(input_length=-1), "input_length must be from 0"),
        ("a.jsonl", line(output_length=10**12), "output_length must be from 0 to 10000000"),
        ("a.jsonl", line(output_length=True), "output_length must be a number, got True"),
        ("a.jsonl", line(timestamp=float("nan")), "timestamp must be a finite number"),
        ("a.jsonl", line(hash_ids="x"), "hash_ids must be a list"),
        ("a.jsonl", line(hash_ids=[-1]), "hash_ids must be from 0"),
        ("a.jsonl", line(timestamp=9000) + "\n" + line(), "line 2 .* 9 s before .* sort the file"),
        ("a.csv.gz", None, "cannot read the trace"),
        ("missing.csv", None, "cannot read the trace"),
        ("missing.jsonl", None, "cannot read the trace"),
    ],
)
def test_what_is_no_trace_is_refused(
    tmp_path: Path, name: str, text: str | None, says: str
) -> None:
    path = tmp_path / name
    if text is not None:
        written(path, text)
    elif not name.startswith("missing"):
        path.write_bytes(b"not gzip")
    with pytest.raises(ConfigError, match=says):
        read_trace(path, block_size=16)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz"])
def test_half_a_file_is_refused(tmp_path: Path, name: str) -> None:
    text = PLAIN if name.startswith("a.csv") else line()
    whole = gzip.compress((text * 500).encode())
    path = tmp_path / name
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"cannot read the trace|is not a request"):
        read_trace(path, block_size=16)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_what_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe\x00\x9d" * 100)
    with pytest.raises(ConfigError, match="is not a text file"):
        read_trace(path, block_size=16)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_lines_are_read_or_refused_and_nothing_else(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(100):
        text = rng.choice([AZURE, BURST_GPT, PLAIN, line() + "\n" + line(timestamp=5)])
        suffix = "jsonl" if text.startswith("{") else "csv"
        damaged = list(text)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice('-9,."\n{}[]naxe \t')
        path = tmp_path / f"{number}.{suffix}"
        path.write_text("".join(damaged))
        try:
            trace = read_trace(path, block_size=16)
        except ConfigError as error:
            assert path.name in str(error)
            continue
        times = [arrival.at_s for arrival in trace.arrivals]
        assert times == sorted(times)
        assert all(a.num_prompt_tokens >= 1 and a.num_output_tokens >= 1 for a in trace.arrivals)
