"""`baton completion`, in the shells that are there."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from baton.cli import main as cli
from baton.cli.completion import SHELLS

ASK_BASH = """
source "$1"
COMP_WORDS=(baton {words})
COMP_CWORD={cword}
_shtab_baton "" "" ""
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A file with the script for each shell."""
    folder = tmp_path_factory.mktemp("scripts")
    for shell in SHELLS:
        done = subprocess.run(
            [sys.executable, "-m", "baton.cli.main", "completion", shell],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert not done.stderr
        (folder / shell).write_text(done.stdout)
    return folder


@pytest.mark.parametrize("shell", SHELLS)
def test_script_knows_commands_and_options_and_the_shell_takes_it(scripts, shell):
    text = (scripts / shell).read_text()
    for word in (*cli.COMMANDS, "http-port", "once"):
        assert word in text
    if shutil.which(shell):
        subprocess.run([shell, "-n", scripts / shell], timeout=20, check=True)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["se"], ["serve"]),
        (["chat", "--onc"], ["--once"]),
        (["completion", "fi"], ["fish"]),
        (["keys", "cr"], ["create"]),
    ],
)
def test_bash_completes(scripts, words, wanted):
    code = ASK_BASH.format(words=" ".join(words), cword=len(words))
    done = subprocess.run(
        ["bash", "-c", code, "-", scripts / "bash"],
        capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert done.stdout.split() == wanted


def test_other_shells_are_named(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["completion", "tcl"])
    assert ended.value.code == 2
    assert "fish" in capsys.readouterr().err
