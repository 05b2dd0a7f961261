"""`baton bench` as a user types it, against a server of known answers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from baton.cli.main import main
from fake_openai import FakeOpenAi, Fault, running


@pytest.fixture
def fake() -> Iterator[FakeOpenAi]:
    with running(FakeOpenAi()) as fake:
        yield fake


def bench(fake: FakeOpenAi, *arguments: str) -> int:
    return main(["bench", "--url", fake.url, *arguments], environ={})


def test_a_run_is_told_as_table_json_and_page(
    fake: FakeOpenAi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.gap_s, fake.cached_tokens = 0.001, 8
    told, page = tmp_path / "run.json", tmp_path / "run.html"
    arguments = ["--requests", "24", "--concurrency", "3", "--lengths", "32/6", "--seed", "5"]
    files = ["--json", str(told), "--details", "--html", str(page)]
    assert bench(fake, *arguments, *files, "--ttft", "5", "--itl", "1") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "24 answered" in out
    assert "mean 32 in, 6 out, 25.0% of prompt tokens cached" in out
    assert "100.0% kept all: TTFT 5 s 100.0%, ITL 1 s 100.0%" in out
    report = json.loads(told.read_text())
    assert report["is_kept"] is True
    assert report["figures"]["num_output_tokens"] == 24 * 6
    assert report["setup"]["seed"] == 5
    assert len(report["requests"]) == 24
    assert report["figures"]["latencies"]["gap_s"]["count"] == 24 * 5
    assert_page_stands_alone(page.read_text())


def assert_page_stands_alone(page: str) -> None:
    """Well-formed, without network and script, for light and dark."""
    depth: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "line"):
                depth.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag != "line":
                assert depth.pop() == tag

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

    Checker().feed(page)
    assert depth == []
    assert page.count('<svg viewBox="0 0 720 240" role="img"') >= 8
    assert "prefers-color-scheme:dark" in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert "NaN" not in page and "inf" not in page.replace("info", "")


def test_what_a_server_says_is_escaped_on_the_page(fake: FakeOpenAi, tmp_path: Path) -> None:
    fake.fault_of = lambda number: Fault.REFUSE if number > 3 else Fault.NONE
    page = tmp_path / "run.html"
    assert bench(fake, "--requests", "6", "--lengths", "20/2", "--html", str(page)) == 1
    text = page.read_text()
    assert "too many &lt;b&gt;requests&lt;/b&gt;" in text
    assert_page_stands_alone(text)


def test_missed_targets_and_failed_requests_are_status_1(
    fake: FakeOpenAi, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--requests", "4", "--lengths", "20/2", "--concurrency", "1"]
    assert bench(fake, *few, "--ttft", "0.000001") == 1
    assert "0.0% kept all" in capsys.readouterr().out
    fake.requests.clear()
    fake.fault_of = lambda number: Fault.REFUSE if number in (2, 3) else Fault.NONE
    assert bench(fake, *few) == 1
    out = capsys.readouterr().out
    assert "2 failed (50.0%)" in out
    assert "2 x refused 429: too many" in out
    fake.requests.clear()
    assert bench(fake, *few, "--share", "0.5") == 0


def test_json_on_standard_output_is_alone_there(
    fake: FakeOpenAi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(fake, "--requests", "2", "--lengths", "20/2", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["figures"]["num_ok"] == 2


def test_traces_prompts_and_rates(fake: FakeOpenAi, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("timestamp,input_length,output_length\n0,30,2\n1,50,3\n2,40,4\n")
    assert bench(fake, "--trace", str(trace), "--speed", "50") == 0
    assert [r["max_tokens"] for r in fake.requests[2:]] == [2, 3, 4]
    fake.requests.clear()
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "hello there", "output_tokens": 3}\n{"prompt": "you"}\n')
    more = ["--rate", "50", "--requests", "5", "--burstiness", "0", "--completions"]
    assert bench(fake, "--prompts", str(prompts), *more) == 0
    assert [r["prompt"] for r in fake.requests[2:]][:3] == ["hello there", "you", "hello there"]


def test_a_duration_alone_sends_as_much_as_it_allows(
    fake: FakeOpenAi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(fake, "--duration", "0.7", "--lengths", "20/2", "--json", "-") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["figures"]["num_ok"] > 100
    assert told["figures"]["span_s"] < 5


def test_nothing_is_imported_while_tokens_are_timed(fake: FakeOpenAi) -> None:
    script = f"""
import sys
from baton.cli.main import main
from baton.loadtest.runner import LoadRunner
run = LoadRunner.run

async def watched(self, *arguments, **named):
    before = set(sys.modules)
    await run(self, *arguments, **named)
    print(sorted(set(sys.modules) - before))

LoadRunner.run = watched
main(["bench", "--url", "{fake.url}", "--requests", "20", "--lengths", "20/4"], environ={{}})
"""
    fake.gap_s = 0.01
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[0] == "[]"


def test_the_key_and_headers_go_with_every_request_and_into_no_report(
    fake: FakeOpenAi, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--url", fake.url + "/v1/", "--requests", "1", "--lengths", "20/2"]
    more = ["--header", "X-SLO-Class: interactive", "--json", "-"]
    assert main([*arguments, *more], environ={"BATON_API_KEY": "sk-secret"}) == 0
    assert all(h["authorization"] == "Bearer sk-secret" for h in fake.headers)
    assert all(h["x-slo-class"] == "interactive" for h in fake.headers)
    assert "sk-secret" not in capsys.readouterr().out


def test_after_a_run_ctrl_c_is_what_it_was(fake: FakeOpenAi) -> None:
    assert bench(fake, "--requests", "2", "--concurrency", "1", "--lengths", "8/2") == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_reports_what_there_was(fake: FakeOpenAi, tmp_path: Path) -> None:
    fake.gap_s = 0.02
    told = tmp_path / "run.json"
    command = [sys.executable, "-m", "baton.cli.main", "bench", "--url", fake.url, "--requests"]
    command += ["100000", "--lengths", "20/4", "--json", str(told)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while len(fake.requests) < 40:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopped early" in out
    report = json.loads(told.read_text())
    assert report["is_stopped"] is True
    assert report["figures"]["num_ok"] > 20
    assert 0 < report["figures"]["num_given_up"] <= 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rate", "0"], "--rate must be between 0.0001 and 100000, got 0"),
        (["--rate", "5", "--concurrency", "5"], "give one of them"),
        (["--lengths", "5"], "--lengths takes numbers such as 512/64, got '5'"),
        (["--lengths", "5/0"], "num_output_tokens must be at least 1, got 0"),
        (["--turns", "x"], "--turns takes numbers such as 4 or 2-6, got 'x'"),
        (["--prefix", "ax2"], "--prefix takes tokens or tokens x groups"),
        (["--trace", "nowhere.jsonl"], "cannot read the trace nowhere.jsonl"),
        (["--prompts", "nowhere.jsonl"], "cannot read the prompts nowhere.jsonl"),
        (["--extra", "[1]"], "--extra takes a JSON object"),
        (["--extra", "{"], "--extra takes a JSON object"),
        (["--header", "nothing"], "--header takes 'Name: value'"),
        (["--header", "a b: c"], "'a b' is no name of a header"),
        (["--header", "X: \u20ac"], "header X must be printable ASCII"),
        (["--no-stream", "--ttft", "1"], "--no-stream measures neither"),
        (["--token-ids", "100"], "--token-ids goes with --completions"),
        (["--token-ids", "1", "--completions"], "--token-ids takes a size of a vocabulary"),
        (["--json", "no/such/folder/x.json"], "its folder must exist"),
        (["--html", "/"], "cannot write /"),
        (["--grpc", "nowhere"], "'nowhere' is no address; write host:port"),
        (["--grpc", "a:1", "--extra", "{}"], "--extra goes with HTTP only"),
        (["--timeout", "0"], "--timeout must be above 0"),
        (["--wait", "-1"], "--wait must be between 0 and 3600"),
        (["--limit", "0", "--prompts", "x"], "--limit must be at least 1, got 0"),
        (["--url", "127.0.0.1:8000"], "is no address of a server"),
        (["--url", "http://127.0.0.1:99999"], "is no address of a server"),
        (["--url", "http://127.0.0.1:9"], "nothing answers at http://127.0.0.1:9"),
        (["--grpc", "127.0.0.1:9"], "nothing answers at 127.0.0.1:9"),
        (["--model", "other"], "does not serve 'other'; it serves fake"),
    ],
)
def test_bad_input_is_one_line_with_the_fix(
    fake: FakeOpenAi, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(fake, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_malformed_trace_names_its_line(
    fake: FakeOpenAi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.jsonl"
    row = {"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": []}
    trace.write_text(json.dumps(row) + '\n{"timestamp": "x"}\n')
    assert bench(fake, "--trace", str(trace)) == 2
    assert "t.jsonl line 2 is not a request" in capsys.readouterr().err
    assert bench(fake, "--trace", str(trace), "--turns", "2") == 2
