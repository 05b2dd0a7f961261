"""The load test that the options of `baton bench` ask for."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

from baton.cli.bench_args import DEFAULT_CONCURRENCY, DEFAULT_LENGTHS
from baton.core.errors import ConfigError

if TYPE_CHECKING:
    from baton.loadtest.load_test import LoadTest
    from baton.loadtest.options import LoadOptions
    from baton.loadtest.target import Target
    from baton.loadtest.workload import Conversation, Fitting
    from baton.simulator.arrivals import RequestLengths

API_KEY = "BATON_API_KEY"
DEFAULT_REQUESTS = 100
DEFAULT_DURATION_S = 3600.0
TABLE_BLOCK_SIZE = 512
"""Of traces without blocks of their own, whose requests share nothing."""


def load_test_of(args: argparse.Namespace, environ: Mapping[str, str]) -> LoadTest:
    """Raises ConfigError or InvalidRequest for options that cannot be, and for bad files."""
    from baton.loadtest.load_test import LoadTest
    from baton.loadtest.options import Targets

    targets = Targets(args.ttft, args.itl, args.e2e, args.share)
    if args.no_stream and (args.ttft is not None or args.itl is not None):
        raise ConfigError("--no-stream measures neither --ttft nor --itl; leave it out")
    if not 0 <= args.wait <= 3600:
        raise ConfigError(f"--wait must be between 0 and 3600 seconds, got {args.wait:g}")
    if not 0 < args.timeout <= 86_400:
        raise ConfigError(f"--timeout must be above 0 and at most 86400, got {args.timeout:g}")
    _check_token_ids(args)
    seed = random.SystemRandom().getrandbits(31) if args.seed is None else args.seed
    conversations, options = _load(args, seed)
    return LoadTest(
        _target_maker(args, environ),
        conversations,
        options,
        targets,
        model=args.model,
        wait_s=args.wait,
        vocab_size=args.token_ids,
        setup=_setup(args, options),
    )


def _load(args: argparse.Namespace, seed: int) -> tuple[Iterable[Conversation], LoadOptions]:
    """Conversations, in order of their times where they have some, and how they are run."""
    from baton.loadtest.options import LoadOptions
    from baton.loadtest.pacing import at_own_times, at_rate

    conversations, mean_turns, has_times = _conversations(args, seed)
    concurrency = args.concurrency
    if concurrency is None and args.rate is None and not has_times:
        concurrency = DEFAULT_CONCURRENCY
    options = LoadOptions(
        num_requests=_num_requests(args, conversations),
        duration_s=DEFAULT_DURATION_S if args.duration is None else args.duration,
        concurrency=concurrency,
        rate_per_s=args.rate,
        burstiness=args.burstiness,
        max_in_flight=args.max_in_flight,
        seed=seed,
    )
    if concurrency is None:
        if args.rate is None:
            assert isinstance(conversations, list)
            return at_own_times(conversations, args.speed), options
        rate = args.rate / mean_turns
        return at_rate(_repeated(conversations), rate, args.burstiness, seed), options
    return _repeated(conversations), options


def _num_requests(args: argparse.Namespace, conversations: Iterable[Conversation]) -> int:
    from baton.loadtest.options import MAX_REQUESTS

    if args.requests is not None:
        return int(args.requests)
    if args.duration is not None:
        return MAX_REQUESTS
    if isinstance(conversations, list):
        return sum(len(c.turns) for c in conversations)
    return DEFAULT_REQUESTS


def _repeated(conversations: Iterable[Conversation]) -> Iterable[Conversation]:
    """A file from its beginning again when more is wanted than it holds."""
    if not isinstance(conversations, list):
        return conversations
    return (replace(c, number=i) for i, c in enumerate(cycle(conversations)))


def _conversations(
    args: argparse.Namespace, seed: int
) -> tuple[Iterable[Conversation], float, bool]:
    """With their mean number of turns, and whether they have times of their own."""
    from baton.loadtest.conversation_files import read_conversations
    from baton.loadtest.workload import replayed
    from baton.simulator.trace_files import read_trace

    fitting = _fitting(args)
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    if args.prompts is not None:
        _check_made_up_only(args, "--prompts")
        read = read_conversations(
            args.prompts,
            num_output_tokens=args.output,
            fitting=fitting,
            seed=seed,
            limit=args.limit,
        )
        return read, sum(len(c.turns) for c in read) / len(read), False
    if args.trace is None:
        lengths = tuple(_lengths(text) for text in (args.lengths or DEFAULT_LENGTHS).split(","))
        return _made_up(args, lengths, fitting, seed)
    trace = read_trace(args.trace, block_size=TABLE_BLOCK_SIZE, limit=args.limit)
    if trace.lengths:
        return _made_up(args, trace.lengths, fitting, seed)
    _check_made_up_only(args, "a trace with times")
    return replayed(trace.arrivals, trace.block_size, fitting, seed), 1.0, True


def _made_up(
    args: argparse.Namespace, lengths: tuple[RequestLengths, ...], fitting: Fitting, seed: int
) -> tuple[Iterable[Conversation], float, bool]:
    from baton.loadtest.workload import MadeUp, SharedPrefixes, Turns

    low, high = _range("--turns", args.turns, "-")
    turns = Turns(low, high, args.think)
    prefixes = SharedPrefixes()
    if args.prefix is not None:
        num_tokens, _, groups = args.prefix.partition("x")
        try:
            prefixes = SharedPrefixes(int(num_tokens), int(groups or 1))
        except ValueError:
            raise ConfigError(
                f"--prefix takes tokens or tokens x groups such as 512x8, got {args.prefix!r}"
            ) from None
    made = MadeUp(lengths, args.spread, prefixes, turns, fitting)
    return made.conversations(seed), turns.mean, False


def _fitting(args: argparse.Namespace) -> Fitting:
    from baton.loadtest.workload import Fitting

    fitting = Fitting(scale=args.scale_lengths)
    if args.max_prompt is not None:
        fitting = replace(fitting, max_prompt_tokens=args.max_prompt)
    if args.max_output is not None:
        fitting = replace(fitting, max_output_tokens=args.max_output)
    return fitting


def _target_maker(
    args: argparse.Namespace, environ: Mapping[str, str]
) -> Callable[[str, Callable[[], float]], Target]:
    from baton.loadtest.openai_target import HttpOptions, OpenAiTarget, Route

    headers = tuple(_header(text) for text in args.header)
    if environ.get(API_KEY):
        headers = (("Authorization", f"Bearer {environ[API_KEY]}"), *headers)
    if args.grpc is not None:
        return _grpc_maker(args, headers)
    http = HttpOptions(
        args.url,
        route=Route.COMPLETIONS if args.completions else Route.CHAT,
        is_streaming=not args.no_stream,
        ignores_eos=not args.keep_eos,
        timeout_s=args.timeout,
        headers=headers,
        extra=_extra(args.extra),
        ca_file=args.ca,
    )
    return lambda model, now: OpenAiTarget(replace(http, model=model), now)


def _grpc_maker(
    args: argparse.Namespace, headers: tuple[tuple[str, str], ...]
) -> Callable[[str, Callable[[], float]], Target]:
    from baton.loadtest.grpc_target import GrpcOptions, GrpcTarget

    for option, value in (("--extra", args.extra), ("--no-stream", args.no_stream)):
        if value:
            raise ConfigError(f"{option} goes with HTTP only; leave it out, or --grpc")
    grpc = GrpcOptions(
        args.grpc,
        is_chat=not args.completions,
        ignores_eos=not args.keep_eos,
        timeout_s=args.timeout,
        headers=headers,
        ca_file=args.ca,
    )
    return lambda model, now: GrpcTarget(replace(grpc, model=model), now)


def _check_token_ids(args: argparse.Namespace) -> None:
    if args.token_ids is None:
        return
    if not 16 <= args.token_ids <= 10_000_000:
        raise ConfigError(f"--token-ids takes a size of a vocabulary, got {args.token_ids}")
    if not args.completions or args.turns != "1":
        raise ConfigError("--token-ids goes with --completions and single turns")


def _check_made_up_only(args: argparse.Namespace, what: str) -> None:
    for option, is_given in (
        ("--turns", args.turns != "1"),
        ("--prefix", args.prefix is not None),
        ("--spread", args.spread != 0),
    ):
        if is_given:
            raise ConfigError(f"{option} goes with lengths; {what} has its own: leave it out")


def _lengths(text: str) -> RequestLengths:
    from baton.simulator.arrivals import RequestLengths

    return RequestLengths(*_range("--lengths", text, "/", needs_both=True))


def _range(option: str, text: str, separator: str, *, needs_both: bool = False) -> tuple[int, int]:
    low, found, high = text.partition(separator)
    try:
        if needs_both and not found:
            raise ValueError
        return int(low), int(high if found else low)
    except ValueError:
        example = f"512{separator}64" if needs_both else f"4 or 2{separator}6"
        raise ConfigError(f"{option} takes numbers such as {example}, got {text!r}") from None


def _header(text: str) -> tuple[str, str]:
    name, found, value = text.partition(":")
    if not found or not name.strip():
        raise ConfigError(f"--header takes 'Name: value', got {text!r}")
    return name.strip(), value.strip()


def _extra(text: str | None) -> dict[str, object]:
    if text is None:
        return {}
    try:
        value: Any = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra takes a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--extra takes a JSON object, got {text[:60]!r}")
    return value


def _setup(args: argparse.Namespace, options: LoadOptions) -> dict[str, object]:
    """What a report says of the run; nothing that may be secret."""
    loop: dict[str, object] = {"seed": options.seed, "requests": options.num_requests}
    if options.concurrency is not None:
        loop["concurrency"] = options.concurrency
    elif options.rate_per_s is not None:
        loop |= {"rate": options.rate_per_s, "burstiness": options.burstiness}
    else:
        loop["speed"] = args.speed
    lengths = None if args.trace or args.prompts else args.lengths or DEFAULT_LENGTHS
    given = {
        "lengths": lengths,
        "trace": args.trace and args.trace.name,
        "prompts": args.prompts and args.prompts.name,
        "spread": args.spread or None,
        "prefix": args.prefix,
        "turns": None if args.turns == "1" else args.turns,
        "think": args.think or None,
        "token ids": args.token_ids,
        "scale of lengths": None if args.scale_lengths == 1 else args.scale_lengths,
        "longest prompt": args.max_prompt,
        "longest output": args.max_output,
        "extra": args.extra,
    }
    api = "completions" if args.completions else "chat"
    loop["api"] = f"{api} over gRPC" if args.grpc else api
    loop["streaming"] = not args.no_stream
    return {**loop, **{name: value for name, value in given.items() if value is not None}}
