"""The `baton` command: finds the subcommand, turns errors into one line and an exit status.

A subcommand is a module of this package with

    add_arguments(parser)          its options
    run(args, environ) -> int      does it, returns the exit status

and is imported only when it is the one asked for, so that `baton --help` answers at once.
Exit status: 0 done, 1 done with a negative answer, 2 wrong usage or a named error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import baton
from baton.cli.examples import OF_COMMAND, OVERVIEW
from baton.core.errors import BatonError

COMMANDS = {
    "serve": "start router, prefill and decode workers on this machine",
    "chat": "talk to a served model in the terminal",
    "bench": "put load on a server and measure what its clients get",
    "profile": "measure this machine's engine for plans and simulations",
    "plan": "find the pools that serve most within latency targets",
    "simulate": "run a cluster under a load in virtual time",
    "doctor": "say what is wrong with a system, running or to be started",
    "probe": "whether this container's processes live or are ready",
    "drain": "let this container finish before it is stopped",
    "role": "move a running worker to the other pool",
    "certs": "make TLS certificates for a deployment's router and workers",
    "keys": "make, list and revoke API keys",
    "model": "import a model, or show what it costs to run one",
    "completion": "print a script that completes commands in bash, zsh or fish",
}
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class Command(Protocol):
    """What a module of a subcommand offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace, environ: Mapping[str, str]) -> int: ...


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = next((a for a in arguments if not a.startswith("-")), None)
    command = _load(name) if name in COMMANDS else None
    parser = _parser({} if name is None or command is None else {name: command})
    args = parser.parse_args(arguments)
    if command is None:
        parser.print_help()
        return 0
    try:
        return command.run(args, os.environ if environ is None else environ)
    except BatonError as error:
        print(f"baton: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, e.g. `baton model info PATH | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # Disk full, no permission, ...: the system's own words name what and where.
        print(f"baton: error: {error}", file=sys.stderr)
        return EXIT_ERROR


def _load(name: str | None) -> Command:
    return cast(Command, importlib.import_module(f"baton.cli.{name}"))


def whole_parser() -> argparse.ArgumentParser:
    """With the options of every command; loads them all."""
    return _parser({name: _load(name) for name in COMMANDS})


def _parser(loaded: Mapping[str, Command]) -> argparse.ArgumentParser:
    """With the options of the commands that are `loaded`."""
    parser = argparse.ArgumentParser(
        prog="baton",
        description="Disaggregated LLM serving: prefill workers, decode workers, one router.",
        epilog=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"baton {baton.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=OF_COMMAND.get(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in loaded:
            loaded[name].add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
