"""The `baton` command itself: what it loads, and how it fails."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

import baton
from baton.cli import chat, examples
from baton.cli import main as cli
from baton.core.errors import ConfigError


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name, summary in cli.COMMANDS.items():
        assert name in printed
        assert summary in printed
    assert cli.main([]) == 0
    assert capsys.readouterr().out == printed


def test_examples_of_the_help_are_commands_that_exist() -> None:
    shown = "\n".join([examples.OVERVIEW, *examples.OF_COMMAND.values()])
    parser = cli.whole_parser()
    asked = re.findall(r"^  baton (.+?)(?: {2,}.*| >.*)?$", shown, re.MULTILINE)
    assert len(asked) > 15
    for line in asked:
        for arguments in line.split(", baton "):
            words = shlex.split(arguments)
            if words[-1] in ("-h", "--help"):
                assert words[0] in cli.COMMANDS
                continue
            # Ends the test with the parser's own words if it does not take them.
            parser.parse_args(words)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"baton {name}" in capsys.readouterr().out


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"baton {baton.__version__}\n"


def test_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["sreve"])
    assert ended.value.code == 2
    assert "sreve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (ConfigError("value, limit, fix"), 2, "baton: error: value, limit, fix\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "Permission denied: '/x'"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_one_line_and_a_status(
    raised: BaseException,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object) -> int:
        raise raised

    monkeypatch.setattr(chat, "run", fail)
    assert cli.main(["chat"]) == status
    printed = capsys.readouterr().err
    assert words in printed
    assert len(printed.splitlines()) <= 1


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from baton.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'ray', 'grpc', 'httpx', 'rich', 'tokenizers', 'gguf'}\n"
        "print(sorted(heavy & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
