"""`baton plan --explain FILE[:N]`: one decision of a live planner, made again and taken apart."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.core.errors import ConfigError

if TYPE_CHECKING:
    from services.planner.decision_record import Record, Term
    from services.planner.explain import (
        DecodeFigures,
        Explanation,
        PoolExplanation,
        PrefillFigures,
    )

EXIT_DIFFERENT = 1


class _Explain(argparse.Action):
    """What a plan needs, an explanation does not."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        for action in parser._actions:
            action.required = False
        setattr(namespace, self.dest, values)


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    """After all others."""
    group = parser.add_argument_group("a decision of a live planner, instead of a plan")
    group.add_argument(
        "--explain", action=_Explain, metavar="FILE[:N]",
        help="replay a decision log and say why its last decision, or number N, came out so",
    )  # fmt: skip
    group.add_argument(
        "--at", metavar="N|TIME",
        help="another decision of the log: its number, -2 for the one before the last, or the last "
        "one until a time in UTC such as 2026-03-01T14:05",
    )  # fmt: skip


def run_explain(args: argparse.Namespace) -> int:
    """1 when the state machine now decides something else than what was logged."""
    from services.planner.decision_log import read_records
    from services.planner.explain import explain

    path, at = _place(args.explain, args.at)
    number = _number(read_records(path), at, path)
    found = explain(read_records(path), number)
    if args.json:
        print(json.dumps(_as_json(found), indent=1))
    else:
        print("\n".join(_lines(found)))
    return EXIT_DIFFERENT if found.num_different else 0


def _place(text: str, at: str | None) -> tuple[Path, str]:
    """The file, and which decision of it."""
    path, colon, number = text.rpartition(":")
    # A file may have a colon in its name.
    if colon and path and re.fullmatch(r"-?\d+", number) and not Path(text).exists():
        if at is not None:
            raise ConfigError(f"--explain {text} and --at {at} both name a decision: leave one out")
        return Path(path), number
    return Path(text), "-1" if at is None else at


def _number(records: Iterable[Record], at: str, path: Path) -> int:
    """Raises ConfigError when `at` names no decision of the file."""
    if re.fullmatch(r"-?\d+", at):
        wanted = int(at)
        if wanted >= 0:
            return wanted
        numbers = [record.number for record in records]
        if -wanted > len(numbers):
            raise ConfigError(f"{path} holds {len(numbers)} decisions, so there is no {at}")
        return numbers[wanted]
    until_s = _time(at)
    numbers = [record.number for record in records if record.seen.now_s < until_s]
    if not numbers:
        raise ConfigError(f"{path} holds no decision until {at}")
    return numbers[-1]


def _time(text: str) -> float:
    """The end of the minute or second that `text` names."""
    for form, length_s in (("%Y-%m-%dT%H:%M:%S", 1), ("%Y-%m-%dT%H:%M", 60)):
        try:
            found = datetime.strptime(text.removesuffix("Z"), form)
        except ValueError:
            continue
        return found.replace(tzinfo=UTC).timestamp() + length_s
    raise ConfigError(
        "--at takes a decision's number, or a time in UTC such as 2026-03-01T14:05; got "
        f"{text[:60]!r}"
    )


def _as_json(found: Explanation) -> dict[str, Any]:
    from services.planner.plain import to_plain

    values: dict[str, Any] = to_plain(found)
    values["is_reproduced"] = None if found.replayed is None else not found.num_different
    return values


def _lines(found: Explanation) -> Iterable[str]:
    record, seen = found.record, found.record.seen
    load, forecast = seen.load, record.decision.forecast
    yield f"decision {record.number}, {record.at}"
    yield ""
    yield "seen"
    yield (
        f"  {load.rate_per_s:.3g} requests/s at {_num(record.num_copies, 'router')}, of which "
        f"{record.num_refused:g} were sent away"
    )
    yield (
        f"  means: {load.uncached_tokens:.0f} prompt tokens not cached, {load.output_tokens:.0f} "
        f"output tokens, {load.context_tokens:.0f} tokens of context held"
    )
    yield (
        f"  kept TTFT {record.config.ttft_s:g} s: {_share(seen.ttft_attainment)}   "
        f"kept ITL {1000 * record.config.itl_s:g} ms: {_share(seen.itl_attainment)}   "
        f"wanted: {100 * record.config.share:g} %"
    )
    yield (
        f"  steadily {forecast.now:.3g} requests/s; predicted {forecast.rate_per_s:.3g} "
        f"requests/s: level {forecast.level:.3g}, trend {forecast.trend:+.3g}, season "
        f"x{forecast.season:.2f}, floor for bursts {forecast.floor:.3g}"
    )
    if seen.prefill.num_waiting or found.catch_up_per_s:
        yield (
            f"  {seen.prefill.num_waiting:.0f} waiting for their first step; to work them off: "
            f"{found.catch_up_per_s:.3g} requests/s more"
        )
    yield from _terms(record)
    yield ""
    yield from _prefill_lines(found.prefill, found.prefill_now, found.prefill_soon)
    yield ""
    yield from _decode_lines(found.decode, found.decode_now, found.decode_soon)
    yield ""
    yield "both"
    yield from (f"  {sentence}" for sentence in found.sentences)
    if record.orders:
        yield f"  begun: {', '.join(record.orders)}"
    yield ""
    yield _verdict(found)


def _terms(record: Record) -> Iterable[str]:
    for name, term in (("prefill", record.prefill_seconds), ("decode step", record.decode_step)):
        yield f"  {name} seconds: {_term(term)}"


def _term(term: Term) -> str:
    text = f"model x{term.ratio:.2f}, off by {100 * term.error_ratio:.0f} % on average"
    if not term.measured_s:
        return text
    return f"{text}; measured {term.measured_s:.3g} s, predicted {term.predicted_s:.3g} s"


def _prefill_lines(
    pool: PoolExplanation, now: PrefillFigures, soon: PrefillFigures
) -> Iterable[str]:
    yield from _head(pool)
    for when, figures in (("now", now), ("soon", soon)):
        less = figures.miss_share_less
        one_less = "one less would not keep up" if less is None else f"one less: {_share(less)}"
        yield (
            f"  {when}: {figures.rate_per_s:.3g}/s planned x {figures.service_s:.3g} s each = "
            f"{figures.offered:.2f} busy; {_num(figures.num_workers, 'worker')}: "
            f"{_share(figures.wait_share)} wait, {_share(figures.miss_share)} miss ({one_less})"
        )
    yield from (f"  {sentence}" for sentence in pool.sentences)


def _decode_lines(pool: PoolExplanation, now: DecodeFigures, soon: DecodeFigures) -> Iterable[str]:
    yield from _head(pool)
    for when, figures in (("now", now), ("soon", soon)):
        yield (
            f"  {when}: {figures.rate_per_s:.3g}/s planned, batch {figures.batch:.3g} (by pace "
            f"{figures.batch_by_pace:.3g}, by memory {figures.batch_by_memory:.3g}), step "
            f"{1000 * figures.step_s:.3g} ms; {figures.num_sequences:.3g} sequences = "
            f"{_num(figures.num_workers, 'worker')}"
        )
    yield from (f"  {sentence}" for sentence in pool.sentences)


def _head(pool: PoolExplanation) -> Iterable[str]:
    state, decision = pool.state, pool.decision
    yield f"{pool.role.value}: {decision.desired} desired"
    yield (
        f"  there: {state.num_ready} ready, {state.num_starting} starting, {state.num_draining} "
        f"draining; KV {100 * state.kv_usage:.0f} % full"
    )
    yield (
        f"  needed: {decision.needed_now} now, {decision.needed_soon} soon, {decision.kept_for} "
        f"within {pool.window_s:.0f} s; margin x{decision.margin:.2f}"
    )


def _verdict(found: Explanation) -> str:
    if found.replayed is None:
        return "replay: not possible, the file holds no state before this decision"
    total = found.num_equal + found.num_different
    if not found.num_different:
        return f"replay: {_num(total, 'decision')} made once more, all as logged"
    return (
        f"replay: {found.num_different} of {_num(total, 'decision')} came out differently: another "
        f"release wrote this log. Now it would be {found.replayed.prefill.desired} prefill and "
        f"{found.replayed.decode.desired} decode"
    )


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{100 * value:.1f} %"


def _num(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
