"""From what `baton doctor` has seen of machine and workers to findings. Pure.

Links are judged in `doctor_links`. Not known here: how anything was asked.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from baton.cli.doctor_links import judge_links
from baton.cli.doctor_types import Check, Examination, Finding, Severity, WorkerSeen
from baton.core.fabric import FabricCounters
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import LoadReport, Role, WorkerInfo
from kvtransfer.plan import layout_obstacle

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
MACHINE = "this machine"
LOG_FIX = "its log says why"


class _Counted(NamedTuple):
    counter: str
    severity: Severity
    meaning: str


_SHOULD_STAY_ZERO = (
    _Counted("corrupt_blocks", WARNING, "blocks of a tier were damaged and thrown away"),
    _Counted("failed_reads", NOTE, "reads from peers failed"),
    _Counted("expired_leases", NOTE, "leases expired under their readers"),
    _Counted("recycles", NOTE, "times the KV transport was rebuilt to stop a read"),
    _Counted("refused_peers", NOTE, "peers or tools were refused, here or by them"),
    _Counted("failed_takeovers", NOTE, "requests could not be taken over"),
)


def diagnose(seen: Examination) -> list[Finding]:
    """All findings, errors first; in each severity in the order of looking."""
    found = [
        *_of_machine(seen.checks),
        *_of_identities(seen.workers),
        *itertools.chain.from_iterable(_of_worker(worker) for worker in seen.workers),
        *_of_pools(seen.workers, is_selection=seen.is_selection),
        *judge_links(seen.links),
    ]
    return sorted(found, key=lambda finding: finding.severity)


def diagnose_machine(checks: Sequence[Check]) -> list[Finding]:
    """Of a machine where nothing runs yet."""
    return sorted(_of_machine(checks), key=lambda finding: finding.severity)


def _of_machine(checks: Sequence[Check]) -> Iterator[Finding]:
    for check in checks:
        if check.severity is not None:
            yield Finding(check.severity, MACHINE, f"{check.name}: {check.found}", check.fix)


def _of_worker(worker: WorkerSeen) -> Iterator[Finding]:
    info = worker.info
    if info is None:
        yield _of_silence(worker)
        return
    yield from _of_registration(worker, info)
    if worker.hashing_problem:
        yield Finding(
            ERROR,
            worker.name,
            f"its blocks are named otherwise than here: {worker.hashing_problem}",
            "routers place it by load alone and never hit its cache; run one release everywhere",
        )
    if worker.load is not None:
        yield from _of_load(worker.name, info, worker.load)
    if worker.failure:
        severity = ERROR if worker.load is None else WARNING
        yield Finding(severity, worker.name, worker.failure, LOG_FIX)
    if worker.fabric is not None:
        yield from _of_counters(worker.name, worker.fabric.counters)
        for tier in worker.fabric.tiers:
            if tier.reason:
                problem = f"its {tier.tier.value} tier takes no more blocks: {tier.reason}"
                yield Finding(WARNING, worker.name, problem, "free or repair what it names")


def _of_silence(worker: WorkerSeen) -> Finding:
    entry = worker.entry
    if entry is not None and not entry.has_process:
        return Finding(
            NOTE,
            worker.name,
            f"its process {entry.info.pid} has ended and the registration is still there",
            "routers ignore it and remove it by themselves",
        )
    problem = f"unreachable at {worker.address}: {worker.failure}"
    if entry is not None and entry.age_s > entry.ttl_s:
        problem += f"; its registration lapsed {entry.age_s - entry.ttl_s:.0f} s ago"
    if entry is not None and worker.process_state:
        problem += f"; its process {entry.info.pid} is {worker.process_state}"
    return Finding(ERROR, worker.name, problem, _silence_fix(worker))


def _silence_fix(worker: WorkerSeen) -> str:
    entry = worker.entry
    if entry is not None and "stopped" in worker.process_state:
        return f"let it go on with `kill -CONT {entry.info.pid}`, or end it: it is started anew"
    if "TLS" in worker.failure or "certificate" in worker.failure:
        return "give this command the deployment's certificates: --tls-dir, or --run-dir"
    if entry is not None:
        return f"look into its log; a hung process {entry.info.pid} can be ended, it starts anew"
    return "is the address right, the worker running, and no firewall between?"


def _of_registration(worker: WorkerSeen, info: WorkerInfo) -> Iterator[Finding]:
    entry = worker.entry
    if entry is None:
        return
    registered = entry.info
    if (registered.worker_id, registered.epoch) != (info.worker_id, info.epoch):
        yield Finding(
            ERROR,
            str(registered.worker_id),
            f"stale registration: at {registered.address} it names epoch {registered.epoch}, and "
            f"{info.worker_id} in epoch {info.epoch} answers",
            "two workers may have one id, or one address; each needs its own",
        )
    elif entry.age_s > entry.ttl_s:
        yield Finding(
            ERROR,
            worker.name,
            f"it answers, but its registration lapsed {entry.age_s - entry.ttl_s:.0f} s ago: "
            "routers and peers do not know it any more",
            "is the registry directory writable for it, and its disk not full?",
        )


def _of_identities(workers: Sequence[WorkerSeen]) -> Iterator[Finding]:
    """One id, one process; and all of one opinion on a peer's epoch."""
    epochs: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for worker in workers:
        if worker.info is not None:
            epochs[worker.info.worker_id].add((worker.info.epoch, worker.address))
    for worker_id, starts in epochs.items():
        if len({epoch for epoch, _ in starts}) > 1:
            where = " and ".join(f"{address} ({epoch})" for epoch, address in sorted(starts))
            yield Finding(
                ERROR,
                worker_id,
                f"two processes have this worker id: {where}",
                "give each worker an id of its own; peers take one for the other",
            )
    for worker in workers:
        for link in worker.fabric.links if worker.fabric is not None else ():
            known = {epoch for epoch, _ in epochs.get(link.peer_id, set())}
            if known and link.peer_epoch not in known:
                yield Finding(
                    WARNING,
                    worker.name,
                    f"it holds a link to {link.peer_id} of epoch {link.peer_epoch}, which is "
                    f"{', '.join(sorted(known))} now",
                    "a router tells it of the new one within seconds; if not, does one run?",
                )


def _of_load(name: str, info: WorkerInfo, load: LoadReport) -> Iterator[Finding]:
    if load.is_unhealthy:
        fix = "it ends by itself and is started anew; its log says what it waited for"
        yield Finding(ERROR, name, "its engine makes no progress", fix)
    if load.is_draining:
        yield Finding(NOTE, name, "it drains and takes no new work")
    if info.transport in ("", "none"):
        yield Finding(
            WARNING,
            name,
            "it offers no KV transport: it computes every prompt itself and helps nobody",
            "its log says why no transport could be made",
        )
    is_idle = not (load.num_running or load.num_waiting or load.queued_prefill_tokens)
    if not is_idle:
        return
    if load.leases or load.reservations:
        yield Finding(
            WARNING,
            name,
            f"idle, and still {load.leases} leases and {load.reservations} reservations are held",
            "a lease of a reader that died ends within transfer.lease_s; look again after that, "
            "what stays is leaked: restart the worker and report it with its log",
        )
    if load.quarantined_blocks:
        yield Finding(
            WARNING,
            name,
            f"idle, and {load.quarantined_blocks} blocks are in quarantine: reads that were given "
            "up on may still write there",
            "they come back when the transport has settled or is rebuilt; if not, restart it",
        )
    held = load.total_blocks - load.free_blocks - load.cached_blocks - load.quarantined_blocks
    if held and not (load.leases or load.reservations):
        yield Finding(
            ERROR,
            name,
            f"idle, and {held} of {load.total_blocks} blocks belong to nothing: leaked",
            "restart the worker and report it with its log",
        )


def _of_counters(name: str, counters: FabricCounters) -> Iterator[Finding]:
    counts = {counted.counter: 0.0 for counted in _SHOULD_STAY_ZERO}
    counts |= {
        "corrupt_blocks": counters.corrupt_blocks,
        "failed_reads": counters.failed_reads,
        "expired_leases": counters.expired_leases,
        "recycles": counters.recycles,
        "refused_peers": counters.refused_peers,
        "failed_takeovers": counters.failed_takeovers,
    }
    for counted in _SHOULD_STAY_ZERO:
        count = counts[counted.counter]
        if count:
            problem = f"since its start {count:.0f} {counted.meaning} ({counted.counter})"
            yield Finding(counted.severity, name, problem, LOG_FIX)


def _of_pools(workers: Sequence[WorkerSeen], *, is_selection: bool) -> Iterator[Finding]:
    infos = [worker.info for worker in workers if worker.info is not None]
    if not is_selection and not any(info.role is Role.DECODE for info in infos):
        yield Finding(ERROR, "all workers", "no decode worker answers: nothing can be generated")
    groups: dict[tuple[str, KvLayout], list[WorkerInfo]] = defaultdict(list)
    for info in infos:
        groups[info.model_name, info.layout].append(info)
    for (one_model, one), (other_model, other) in itertools.combinations(groups, 2):
        names = [_names(groups[one_model, one]), _names(groups[other_model, other])]
        obstacle = layout_obstacle(other, one)
        both = groups[one_model, one], groups[other_model, other]
        if obstacle and one_model == other_model and _are_revisions(one, other, both):
            yield Finding(
                NOTE,
                f"{names[0]} and {names[1]}",
                f"they serve two revisions of {one_model} (fingerprints {one.fingerprint} and "
                f"{other.fingerprint}), which share no KV",
                "as during a roll-out; afterwards one of them is gone",
            )
        elif obstacle and one_model == other_model:
            yield Finding(
                ERROR,
                f"{names[0]} and {names[1]}",
                f"they serve {one_model} and cannot exchange KV: {obstacle} "
                f"(fingerprints {one.fingerprint} and {other.fingerprint})",
                "serve the same folder with the same engine.dtype, kv_cache_dtype and block_size",
            )
        elif one_model != other_model:
            yield Finding(
                NOTE,
                f"{names[0]} and {names[1]}",
                f"they serve {one_model} and {other_model} and exchange no KV",
            )


def _are_revisions(
    one: KvLayout, other: KvLayout, both: tuple[Sequence[WorkerInfo], Sequence[WorkerInfo]]
) -> bool:
    """Other weights, and each can answer by itself."""
    can_answer = all(any(info.role is Role.DECODE for info in infos) for infos in both)
    return one.model_id != other.model_id and can_answer


def _names(infos: Sequence[WorkerInfo]) -> str:
    return ", ".join(str(info.worker_id) for info in infos)
