"""Which measured links are bad, and what to do about each. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from baton.cli.doctor_types import Finding, LinkSeen, Severity
from baton.core.fabric import LinkReport
from services.worker.link_check import SLOW_LATENCY_S, SLOW_SHARE, TCP_LANES

SLOW_RATIO = 1 / 3
"""A link below this share of the best of its kind is worth a word: timed reads of small blocks on
a busy machine differ by half as a matter of course."""
_FIXES = (
    ("wrong signature", "give both one secret: transfer.cluster_secret, or one registry directory"),
    (
        "is not registered",
        "give all workers one registry directory, or let one router know them all; a worker that "
        "has just started needs a moment",
    ),
    ("another epoch", "give each worker an id of its own; after a restart wait a few seconds"),
    ("protocol version", "run one release on all workers"),
    (
        "EPERM",
        "run both as one user with kernel.yama.ptrace_scope below 2 and, in containers, with the "
        "capability SYS_PTRACE",
    ),
    ("does not fit", "serve the same folder with the same engine.dtype and block_size"),
    ("certificate", "see `TLS` in docs/security.md: one CA, one tls.name, valid dates"),
    ("not installed", "install it beside Baton on both"),
    ("UCX_", "correct the variable where the workers are started"),
)
"""By words of the reason, in this order."""


def judge_links(links: Sequence[LinkSeen]) -> Iterator[Finding]:
    for link in links:
        if link.report is None:
            if link.failure:
                problem, fix = f"could not be measured: {link.failure}", _fix_of(link.failure)
                yield Finding(Severity.ERROR, link.name, problem, fix)
        elif not link.report.transport:
            reason = link.report.reason or "no link"
            yield Finding(Severity.ERROR, link.name, f"cannot be read: {reason}", _fix_of(reason))
        else:
            yield from _judge_way(link, link.report)
            yield from _judge_speed(link, link.report)
    yield from _compare(links)


def kind_of(link: LinkSeen) -> tuple[str, str, bool] | None:
    """Links of one kind should be about equally fast; None when there is none."""
    report = link.report
    if report is None or not report.transport:
        return None
    return report.transport, report.lane, link.is_near


def _judge_way(link: LinkSeen, report: LinkReport) -> Iterator[Finding]:
    way = f"{report.transport} ({report.lane or 'lane unknown'})"
    if link.is_near and not TCP_LANES.isdisjoint((report.transport, report.lane)):
        yield Finding(
            Severity.WARNING,
            link.name,
            f"read by {way} although both run on one host: {report.reason or 'no reason given'}",
            _fix_of(report.reason, "set transfer.transport to auto on both"),
        )
    elif report.reason:
        yield Finding(
            Severity.NOTE,
            link.name,
            f"read by {way}; not taken were: {report.reason}",
            _fix_of(report.reason, "nothing, if that is what you meant"),
        )


def _judge_speed(link: LinkSeen, report: LinkReport) -> Iterator[Finding]:
    if link.is_near and 0 < link.memory_share < SLOW_SHARE:
        yield Finding(
            Severity.WARNING,
            link.name,
            f"{report.bytes_per_second / 1e9:.2f} GB/s, {link.memory_share:.0%} of a memory copy "
            f"in the reader ({link.memory_bytes_per_second / 1e9:.1f} GB/s)",
            "is the host busy, or are the two on different NUMA nodes? Measure again when it is "
            "quiet, with more --rounds",
        )
    if report.latency_s > SLOW_LATENCY_S:
        yield Finding(
            Severity.WARNING,
            link.name,
            f"one block takes {report.latency_s * 1e3:.1f} ms, limit {SLOW_LATENCY_S * 1e3:.0f} ms",
            "is one of the two short of CPU? The KV mover is a thread that needs a core at times",
        )


def _compare(links: Sequence[LinkSeen]) -> Iterator[Finding]:
    kinds: dict[tuple[str, str, bool], list[tuple[float, LinkSeen]]] = defaultdict(list)
    for link in links:
        kind = kind_of(link)
        if kind is not None and link.report is not None and link.report.bytes_per_second > 0:
            kinds[kind].append((link.report.bytes_per_second, link))
    for (transport, lane, _), group in kinds.items():
        best_rate, best = max(group, key=lambda each: each[0])
        for rate, link in group:
            if rate < SLOW_RATIO * best_rate:
                yield Finding(
                    Severity.WARNING,
                    link.name,
                    f"{rate / 1e9:.2f} GB/s by {transport} ({lane}), {rate / best_rate:.0%} of "
                    f"{best.name} with {best_rate / 1e9:.2f} GB/s",
                    "compare the hosts of the two: load, NUMA node, network port; measure again "
                    "with more --rounds",
                )


def _fix_of(reason: str, otherwise: str = "") -> str:
    for words, fix in _FIXES:
        if words in reason:
            return fix
    return otherwise or "the reader's log has the details: `no link to`"
