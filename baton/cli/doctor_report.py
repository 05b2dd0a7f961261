"""An examination as text for people and as JSON for machines. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from baton.cli.doctor_types import Check, Examination, Finding, LinkSeen, Severity, WorkerSeen

FORMAT = 1
"""Of the JSON; raised when a field changes its meaning."""
_WORKER_HEAD = ("worker", "role", "address", "epoch", "layout", "blocks in use", "held", "requests")
_LINK_HEAD = ("reader <- owner", "transport", "lane", "GB/s", "of memcpy", "one block")
_MARKS = {None: "ok", Severity.ERROR: "ERROR", Severity.WARNING: "warning", Severity.NOTE: "note"}
NO_VALUE = "-"


def machine_report(checks: Sequence[Check], findings: Sequence[Finding]) -> str:
    """Where no worker was asked."""
    return "\n\n".join([_machine_text(checks), _findings_text(findings)])


def text_report(seen: Examination, findings: Sequence[Finding]) -> str:
    parts = [
        _machine_text(seen.checks),
        _table([_WORKER_HEAD, *(_worker_row(worker) for worker in seen.workers)]),
    ]
    if seen.links:
        parts.append(_table([_LINK_HEAD, *(_link_row(link) for link in seen.links)]))
        rate = max(link.memory_bytes_per_second for link in seen.links)
        if rate:
            parts[-1] += f"\nmemcpy: copies within the reader, {rate / 1e9:.1f} GB/s at best"
    else:
        parts.append("no link to measure: no two workers of one model and layout answer")
    parts.append(_findings_text(findings))
    return "\n\n".join(parts)


def json_report(seen: Examination, findings: Sequence[Finding]) -> str:
    report: dict[str, Any] = {
        "format": FORMAT,
        "is_healthy": is_healthy(findings),
        "machine": [asdict(check) | {"severity": _name(check.severity)} for check in seen.checks],
        "workers": [_worker_json(worker) for worker in seen.workers],
        "links": [_link_json(link) for link in seen.links],
        "findings": [asdict(each) | {"severity": _name(each.severity)} for each in findings],
    }
    return json.dumps(report, indent=1)


def is_healthy(findings: Sequence[Finding]) -> bool:
    return all(finding.severity is not Severity.ERROR for finding in findings)


def summary(findings: Sequence[Finding]) -> str:
    counts = [sum(each.severity is severity for each in findings) for severity in Severity]
    words = [
        f"{count} {severity.name.lower()}{'' if count == 1 else 's'}"
        for count, severity in zip(counts, Severity, strict=True)
        if count
    ]
    state = "healthy" if is_healthy(findings) else "not healthy"
    return f"{state}: {', '.join(words)}" if words else state


def _findings_text(findings: Sequence[Finding]) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.severity]:8}{finding.subject}: {finding.problem}")
        if finding.fix:
            lines.append(f"{'':8}-> {finding.fix}")
    return "\n".join([*lines, summary(findings)])


def _machine_text(checks: Sequence[Check]) -> str:
    return "this machine\n" + _table([_check_row(check) for check in checks])


def _check_row(check: Check) -> tuple[str, ...]:
    return f"  {_MARKS[check.severity]}", check.name, check.found


def _worker_row(worker: WorkerSeen) -> tuple[str, ...]:
    info, load = worker.info, worker.load
    if info is None or load is None:
        role = worker.entry.info.role.value if worker.entry is not None else NO_VALUE
        return worker.name, role, worker.address, "no answer"
    used = load.total_blocks - load.free_blocks - load.cached_blocks
    return (
        str(info.worker_id),
        info.role.value,
        worker.address,
        str(info.epoch),
        info.layout.fingerprint,
        f"{used}/{load.total_blocks}",
        f"{load.leases} leases, {load.quarantined_blocks} quarantined",
        f"{load.num_running} running, {load.num_waiting} waiting",
    )


def _link_row(link: LinkSeen) -> tuple[str, ...]:
    report = link.report
    if report is None or not report.transport:
        return link.name, "none", NO_VALUE, NO_VALUE, NO_VALUE, NO_VALUE
    return (
        link.name,
        report.transport,
        report.lane or NO_VALUE,
        f"{report.bytes_per_second / 1e9:.2f}",
        f"{link.memory_share:.0%}" if link.is_near and link.memory_share else NO_VALUE,
        f"{report.latency_s * 1e3:.2f} ms",
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; rows may end early."""
    widths: dict[int, int] = {}
    for row in rows:
        for column, cell in enumerate(row[:-1]):
            widths[column] = max(widths.get(column, 0), len(cell))
    return "\n".join(
        "  ".join(
            cell if column == len(row) - 1 else cell.ljust(widths[column])
            for column, cell in enumerate(row)
        )
        for row in rows
    )


def _worker_json(worker: WorkerSeen) -> dict[str, Any]:
    info, entry = worker.info, worker.entry
    registration = None
    if entry is not None:
        registration = {
            "worker_id": entry.info.worker_id,
            "epoch": entry.info.epoch,
            "age_s": round(entry.age_s, 3),
            "ttl_s": entry.ttl_s,
            "has_process": entry.has_process,
        }
    described = None
    if info is not None:
        described = asdict(info) | {
            "role": info.role.value,
            "fingerprint": info.layout.fingerprint,
        }
    return {
        "name": worker.name,
        "address": worker.address,
        "registration": registration,
        "info": described,
        "load": None if worker.load is None else asdict(worker.load),
        "fabric": None if worker.fabric is None else _fabric_json(worker),
        "failure": worker.failure,
        "hashing_problem": worker.hashing_problem,
        "process_state": worker.process_state,
    }


def _fabric_json(worker: WorkerSeen) -> dict[str, Any]:
    assert worker.fabric is not None
    values = asdict(worker.fabric)
    values["tiers"] = [asdict(tier) | {"tier": tier.tier.value} for tier in worker.fabric.tiers]
    return values


def _link_json(link: LinkSeen) -> dict[str, Any]:
    return asdict(link) | {"memory_share": round(link.memory_share, 4)}


def _name(severity: Severity | None) -> str:
    return "ok" if severity is None else severity.name.lower()
