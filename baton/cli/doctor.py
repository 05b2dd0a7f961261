"""`baton doctor`: says what is wrong with a system that runs, or will be with one to be started.

With --settings it looks at settings and machine alone (`doctor_before`). Otherwise:

 1. This machine: what KV transports need of it.
 2. Every worker: who it is, what it holds, how its peers are read.
 3. Every pair, one after the other: timed reads.

Only reads go over the links, into blocks kept free for that, so it may run beside traffic; figures
are then those of a busy system. Exit status: 0 healthy, 1 at least one error, 2 could not run.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from baton.core.errors import BadPeerCard, ConfigError
from baton.process import add_settings_arguments

if TYPE_CHECKING:
    from baton.cli.doctor_places import Places
    from baton.cli.doctor_types import Examination, LinkSeen

TIMEOUT_S = 10.0
ROUNDS = 8
EXIT_UNHEALTHY = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--settings",
        type=Path,
        metavar="DIR",
        help="before anything starts: look at what the settings files in DIR need of this machine, "
        "and ask no worker",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="run directory of the system (default: of the one `baton serve` that runs here)",
    )
    parser.add_argument(
        "--worker",
        action="append",
        default=[],
        dest="workers",
        metavar="HOST:PORT",
        help="ask this worker instead of those registered; may be repeated",
    )
    parser.add_argument(
        "--secret-file",
        type=Path,
        metavar="FILE",
        help="holds the cluster secret (default: as the settings or the run directory have it)",
    )
    parser.add_argument(
        "--tls-dir",
        type=Path,
        metavar="DIR",
        help="certificates that `baton certs DIR` made (default: as the workers' settings say)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        metavar="N",
        help="timed reads for each link and figure (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_S,
        metavar="S",
        help="seconds that one call to a worker may take (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_settings_arguments(parser, example="tls.name=production")


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from baton.cli.doctor_findings import diagnose
    from baton.cli.doctor_places import Given, find_places
    from baton.cli.doctor_report import is_healthy, json_report, text_report
    from baton.core.logging import setup_logging
    from services.worker.link_check import MAX_ROUNDS

    if not 1 <= args.rounds <= MAX_ROUNDS:
        raise ConfigError(f"--rounds must be between 1 and {MAX_ROUNDS}, got {args.rounds}")
    if not args.timeout > 0:
        raise ConfigError(f"--timeout must be above zero, got {args.timeout:g}")
    setup_logging("doctor", level="WARNING", as_json=False)
    if args.settings is not None:
        return _before(args.settings, environ, as_json=args.json)
    given = Given(
        workers=tuple(args.workers),
        run_dir=args.run_dir,
        secret_file=args.secret_file,
        tls_dir=args.tls_dir,
        config=args.config,
        overrides=tuple(args.overrides),
    )
    places = find_places(given, environ)
    progress = ProgressLine()
    try:
        seen = asyncio.run(_examine(places, environ, args, progress))
    finally:
        progress.clear()
    _check_admitted(seen)
    findings = diagnose(seen)
    print((json_report if args.json else text_report)(seen, findings))
    return 0 if is_healthy(findings) else EXIT_UNHEALTHY


def _before(folder: Path, environ: Mapping[str, str], *, as_json: bool) -> int:
    from baton.cli.doctor_before import check_before
    from baton.cli.doctor_findings import diagnose_machine
    from baton.cli.doctor_report import is_healthy, json_report, machine_report
    from baton.cli.doctor_types import Examination

    checks = tuple(check_before(folder, environ))
    findings = diagnose_machine(checks)
    if as_json:
        print(json_report(Examination(checks, (), ()), findings))
    else:
        print(machine_report(checks, findings))
    return 0 if is_healthy(findings) else EXIT_UNHEALTHY


async def _examine(
    places: Places, environ: Mapping[str, str], args: argparse.Namespace, progress: ProgressLine
) -> Examination:
    from baton.cli.doctor_ask import asker
    from baton.cli.doctor_machine import check_machine
    from baton.cli.doctor_places import process_ids
    from baton.cli.doctor_store import check_store
    from baton.cli.doctor_types import Examination
    from baton.cli.doctor_versions import check_versions

    progress("looking at this machine")
    checks = [*check_versions(), *check_machine(environ, process_ids(places.workers), places.tiers)]
    if places.store_url is not None:
        checks += check_store(places.store_url)
    ask = asker(places, timeout_s=args.timeout, progress=progress)
    workers = await ask.workers(places.workers)
    links = await ask.links(workers, num_rounds=args.rounds)
    workers = await ask.settled(workers)
    return Examination(tuple(checks), tuple(workers), tuple(links), is_selection=bool(args.workers))


def _check_admitted(seen: Examination) -> None:
    """Raises BadPeerCard when every worker that could have measured refused our card."""
    tried: list[LinkSeen] = list(seen.links)
    if tried and all(link.is_refused for link in tried):
        raise BadPeerCard(
            f"no worker measures for this command: {tried[0].reader} answers: {tried[0].failure} "
            "Give the cluster secret of this deployment by --run-dir or --secret-file."
        )


class ProgressLine:
    """What is being done, on one line of a terminal's stderr; silent elsewhere."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()
        self._width = 0

    def __call__(self, what: str) -> None:
        if self._is_shown:
            print(f"\r{what.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(what)

    def clear(self) -> None:
        if self._is_shown:
            print(f"\r{' ' * self._width}\r", end="", file=sys.stderr, flush=True)
