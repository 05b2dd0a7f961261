"""What `baton doctor` makes of what it has seen."""

from __future__ import annotations

import dataclasses
import json

import pytest

from baton.cli.doctor_findings import diagnose
from baton.cli.doctor_report import is_healthy, json_report, summary, text_report
from baton.cli.doctor_types import Check, Examination, LinkSeen, Severity, WorkerSeen
from baton.core.fabric import FabricCounters, FabricReport, LinkReport, TierName, TierReport
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, LoadReport, Role, WorkerId, WorkerInfo
from baton.registry.directory import RegistryEntry

GB = 1e9
LAYOUT = KvLayout("m", 2, 2, 8, 16, "bfloat16")
QUIET = LoadReport(free_blocks=6, cached_blocks=4, total_blocks=10)
ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE


def info(name="decode-0", role=Role.DECODE, epoch="e0", layout=LAYOUT, **changes):
    values = {
        "worker_id": WorkerId(name),
        "epoch": Epoch(epoch),
        "role": role,
        "address": "127.0.0.1:7000",
        "model_name": "tiny",
        "layout": layout,
        "num_blocks": 10,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "transport": "shm",
        "pid": 42,
    }
    return WorkerInfo(**{**values, **changes})


def entry(registered=None, age_s=0.5, has_process=True):
    return RegistryEntry(registered or info(), 5.0, age_s, has_process)


def worker(who=None, load=QUIET, **fields):
    who = who or info()
    values = {"address": who.address, "entry": entry(who), "info": who, "load": load}
    return WorkerSeen(**{**values, **fields})


def silent(**fields):
    return worker(**{"load": None, "failure": "no answer within 3 s", **fields, "info": None})


def link(reader="decode-0", owner="prefill-0", rate=8 * GB, is_near=True, **fields):
    report = {
        "peer_id": WorkerId(owner),
        "peer_epoch": Epoch("e"),
        "transport": "shm",
        "lane": "mapped memory",
        "bytes_per_second": rate,
        "latency_s": 1e-4,
    }
    report = LinkReport(**{**report, **fields})
    return LinkSeen(WorkerId(reader), WorkerId(owner), is_near, report, 10 * GB)


def findings(*workers, links=(), checks=(), is_selection=False):
    seen = Examination(tuple(checks), workers or (worker(),), tuple(links), is_selection)
    return diagnose(seen)


def only(found):
    (finding,) = found
    return finding


def test_good_system_has_no_finding():
    others = [worker(info("prefill-0", Role.PREFILL)), worker()]
    assert findings(*others, links=[link()]) == []


@pytest.mark.parametrize(
    ("seen", "severity", "problem", "fix"),
    [
        (silent(), ERROR, "unreachable at 127.0.0.1:7000: no answer within 3 s", "log"),
        (silent(process_state="stopped by a signal"), ERROR, "42 is stopped", "kill -CONT 42"),
        (silent(entry=entry(age_s=9)), ERROR, "registration lapsed 4 s ago", "log"),
        (silent(entry=entry(has_process=False)), NOTE, "process 42 has ended", "remove it"),
        (silent(failure="it speaks TLS"), ERROR, "it speaks TLS", "--tls-dir"),
        (worker(entry=entry(age_s=9)), ERROR, "it answers, but its registration", "writable"),
        (worker(entry=entry(info(epoch="old"))), ERROR, "stale registration", "own"),
        (worker(failure="it gives no fabric report: x"), WARNING, "no fabric report", "log"),
        (worker(load=None, failure="then no more"), ERROR, "then no more", "log"),
    ],
)
def test_silence_and_registrations(seen, severity, problem, fix):
    healthy = worker(info("decode-9", address="h:1"))
    finding = only(findings(healthy, seen))
    assert finding.severity is severity
    assert problem in finding.problem
    assert fix in finding.fix


@pytest.mark.parametrize(
    ("load", "severity", "words"),
    [
        ({"leases": 2}, WARNING, "idle, and still 2 leases and 0 reservations"),
        ({"reservations": 1}, WARNING, "0 leases and 1 reservations"),
        ({"quarantined_blocks": 3, "free_blocks": 3}, WARNING, "3 blocks are in quarantine"),
        ({"free_blocks": 4}, ERROR, "2 of 10 blocks belong to nothing"),
        ({"is_unhealthy": True}, ERROR, "makes no progress"),
        ({"is_draining": True}, NOTE, "drains"),
    ],
)
def test_what_a_worker_holds(load, severity, words):
    finding = only(findings(worker(load=dataclasses.replace(QUIET, **load))))
    assert finding.severity is severity
    assert words in finding.problem


def test_busy_worker_may_hold_blocks_and_leases():
    load = dataclasses.replace(QUIET, num_running=1, free_blocks=1, leases=3, quarantined_blocks=1)
    assert findings(worker(load=load)) == []


def test_counters_tiers_and_old_links_are_told():
    fabric = FabricReport(
        links=(LinkReport(WorkerId("decode-0"), Epoch("old"), "shm"),),
        tiers=(TierReport(TierName.DISK, reason="no space left"),),
        counters=FabricCounters(corrupt_blocks=2, refused_peers=1),
    )
    reader = worker(info("prefill-0", Role.PREFILL, "p"), fabric=fabric)
    texts = [f"{found.severity.name} {found.problem}" for found in findings(worker(), reader)]
    assert [text.split()[0] for text in texts] == ["WARNING", "WARNING", "WARNING", "NOTE"]
    joined = "\n".join(texts)
    for words in ("decode-0 of epoch old, which is e0 now", "no space left", "2 blocks of a tier"):
        assert words in joined


def test_two_processes_with_one_id():
    twins = [worker(), worker(info(epoch="e1", address="127.0.0.1:7001"))]
    assert "two processes have this worker id" in only(findings(*twins)).problem


def test_layouts_of_one_model_must_fit():
    smaller = dataclasses.replace(LAYOUT, block_size=8)
    other = dataclasses.replace(LAYOUT, dtype="float32")
    prefill = info("prefill-0", Role.PREFILL, layout=smaller)
    assert findings(worker(), worker(prefill)) == []
    finding = only(findings(worker(), worker(info("prefill-0", Role.PREFILL, layout=other))))
    assert finding.severity is ERROR
    assert finding.subject == "decode-0 and prefill-0"
    assert "dtype: bfloat16 here, float32 there" in finding.problem
    assert LAYOUT.fingerprint in finding.problem
    foreign = info("decode-1", layout=other, model_name="other")
    assert only(findings(worker(), worker(foreign))).severity is NOTE


def test_two_revisions_that_both_answer_are_a_roll_out():
    newer = dataclasses.replace(LAYOUT, model_id="newer")
    both = [worker(), worker(info("decode-1", layout=newer))]
    finding = only(findings(*both))
    assert finding.severity is NOTE and "two revisions of tiny" in finding.problem
    lone = [worker(), worker(info("prefill-0", Role.PREFILL, layout=newer))]
    assert only(findings(*lone)).severity is ERROR


def test_blocks_that_are_named_otherwise_are_an_error():
    finding = only(findings(worker(hashing_problem="it hashes blocks by md5, not blake2b-128")))
    assert finding.severity is ERROR and "by md5" in finding.problem


def test_system_without_decode_worker_is_no_system_unless_selected_so():
    prefill = worker(info("prefill-0", Role.PREFILL))
    assert "no decode worker" in only(findings(prefill)).problem
    assert findings(prefill, is_selection=True) == []


@pytest.mark.parametrize(
    ("bad", "severity", "problem", "fix"),
    [
        (link(transport="", reason="refused: wrong signature"), ERROR, "cannot be read", "secret"),
        (link(transport="", reason="at x:1 did not answer"), ERROR, "did not answer", "log"),
        (
            link(transport="socket", lane="tcp", reason="shm: another user; nixl: EPERM"),
            WARNING,
            "although both run on one host",
            "SYS_PTRACE",
        ),
        (link(reason="nixl: not installed"), NOTE, "not taken were: nixl", "install it"),
        (link(rate=GB), WARNING, "1.00 GB/s, 10% of a memory copy", "NUMA"),
        (link(latency_s=0.02), WARNING, "one block takes 20.0 ms", "CPU"),
    ],
)
def test_bad_links(bad, severity, problem, fix):
    finding = only(findings(links=[bad]))
    assert (finding.severity, finding.subject) == (severity, "decode-0 <- prefill-0")
    assert problem in finding.problem
    assert fix in finding.fix


def test_link_that_could_not_be_measured_is_an_error():
    unmeasured = dataclasses.replace(link(), report=None, failure="no answer within 3 s")
    assert "could not be measured: no answer" in only(findings(links=[unmeasured])).problem


def test_link_much_slower_than_the_best_of_its_kind():
    far = [
        link("a", "b", 20 * GB, is_near=False, transport="socket", lane="tcp"),
        link("b", "a", 8 * GB, is_near=False, transport="socket", lane="tcp"),
        link("c", "a", 5 * GB, is_near=False, transport="socket", lane="tcp"),
        link("d", "a", 5 * GB, is_near=False, transport="nixl", lane="rdma"),
    ]
    finding = only(findings(links=far))
    assert (finding.severity, finding.subject) == (WARNING, "c <- a")
    assert "25% of a <- b with 20.00 GB/s" in finding.problem


def test_errors_come_first_and_decide():
    checks = [Check("NIXL", "not installed", NOTE, "install it"), Check("pidfd", "works")]
    found = findings(worker(), silent(), checks=checks)
    assert [each.severity for each in found] == [ERROR, NOTE]
    assert not is_healthy(found)
    assert is_healthy(found[1:])
    assert summary(found) == "not healthy: 1 error, 1 note"
    assert summary([]) == "healthy"


def test_reports_hold_everything():
    fabric = FabricReport(tiers=(TierReport(TierName.HOST, 1, 2, 3),))
    seen = Examination(
        (Check("pidfd", "works"),),
        (worker(fabric=fabric), silent(entry=entry(info("decode-1")))),
        (link(), link("prefill-0", "decode-0", transport="", reason="refused")),
    )
    found = diagnose(seen)
    text = text_report(seen, found)
    for words in (
        "ok  pidfd  works",
        f"e0     {LAYOUT.fingerprint}",
        "decode-1  decode  127.0.0.1:7000  no answer",
        "decode-0 <- prefill-0  shm        mapped memory  8.00  80%        0.10 ms",
        "prefill-0 <- decode-0  none",
        "ERROR   prefill-0 <- decode-0: cannot be read: refused",
        "        -> ",
        "not healthy: 2 errors",
    ):
        assert words in text
    report = json.loads(json_report(seen, found))
    assert report["is_healthy"] is False
    assert [each["name"] for each in report["workers"]] == ["decode-0", "decode-1"]
    assert report["workers"][0]["fabric"]["tiers"][0]["tier"] == "host"
    assert report["links"][0]["report"]["bytes_per_second"] == 8 * GB
    assert report["findings"][0]["severity"] == "error"
