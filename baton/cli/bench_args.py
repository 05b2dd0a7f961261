"""Options of `baton bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_LENGTHS = "128/64"
DEFAULT_CONCURRENCY = 8


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the server")
    group.add_argument("--url", default=DEFAULT_URL, help="its HTTP address (%(default)s)")
    group.add_argument("--grpc", metavar="HOST:PORT", help="ask over gRPC instead")
    group.add_argument("--model", default="", metavar="NAME", help="default: the first served")
    group.add_argument("--completions", action="store_true", help="completions instead of chat")
    group.add_argument("--no-stream", action="store_true", help="whole answers; no TTFT and ITL")
    group.add_argument(
        "--wait", type=float, default=0.0, metavar="S", help="for it to be there (%(default)g)"
    )
    group.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="of one request (%(default)g)"
    )
    group.add_argument(
        "--header", action="append", default=[], metavar="'NAME: VALUE'", help="with every request"
    )
    group.add_argument(
        "--extra", metavar="JSON", help="fields of every body, such as '{\"temperature\": 1}'"
    )
    group.add_argument(
        "--keep-eos", action="store_true", help="let answers end where the model ends them"
    )
    group.add_argument("--ca", metavar="FILE", help="certificates that sign the server's")


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is sent")
    kinds = group.add_mutually_exclusive_group()
    kinds.add_argument(
        "--lengths",
        metavar="IN/OUT[,IN/OUT...]",
        help=f"prompt and output tokens, equally often ({DEFAULT_LENGTHS})",
    )
    kinds.add_argument(
        "--trace", type=Path, metavar="FILE", help="Mooncake, Azure, BurstGPT or lengths alone"
    )
    kinds.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSON lines of prompts or conversations"
    )
    group.add_argument(
        "--spread", type=float, default=0.0, metavar="X", help="lengths vary by ± this share"
    )
    group.add_argument(
        "--prefix", metavar="TOKENS[xGROUPS]", help="prompts begin with one of so many stretches"
    )
    group.add_argument("--turns", default="1", metavar="N[-M]", help="of each conversation (1)")
    group.add_argument(
        "--think", type=float, default=0.0, metavar="S", help="mean time before the next turn (0)"
    )
    group.add_argument(
        "--output", type=int, default=64, metavar="N", help="tokens, where --prompts does not say"
    )
    group.add_argument(
        "--token-ids", type=int, metavar="VOCAB", help="prompts are ids below it (--completions)"
    )
    group.add_argument("--limit", type=int, metavar="N", help="read that many of a file")
    group.add_argument("--scale-lengths", type=float, default=1.0, metavar="X", help="all of them")
    group.add_argument("--max-prompt", type=int, metavar="N", help="longer prompts are cut")
    group.add_argument("--max-output", type=int, metavar="N", help="longer outputs are cut")


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it arrives")
    group.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help=f"closed loop: so many at a time ({DEFAULT_CONCURRENCY} when nothing else is said)",
    )
    group.add_argument(
        "--rate", type=float, metavar="X", help="open loop: requests per second, come what may"
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="of --rate: 0 a clock, 1 Poisson, 4 in clumps (1)",
    )
    group.add_argument(
        "--speed", type=float, default=1.0, metavar="X", help="a trace's own times, faster (1)"
    )
    group.add_argument(
        "--requests", type=int, metavar="N", help="at most (100, all of a file, or what fits)"
    )
    group.add_argument(
        "--duration", type=float, metavar="S", help="then send no more (when all is sent)"
    )
    group.add_argument(
        "--max-in-flight",
        type=int,
        default=4096,
        metavar="N",
        help="of an open loop; more are not sent (%(default)s)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="default: another each time")
    wanted = parser.add_argument_group("what is wanted")
    wanted.add_argument("--ttft", type=float, metavar="S", help="to the first token")
    wanted.add_argument("--itl", type=float, metavar="S", help="mean between tokens of a request")
    wanted.add_argument("--e2e", type=float, metavar="S", help="to the end")
    wanted.add_argument(
        "--share", type=float, default=0.9, metavar="X", help="of all requests (%(default)s)"
    )
