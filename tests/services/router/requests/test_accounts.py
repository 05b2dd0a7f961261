"""What tenants have used, and what of it was good."""

from __future__ import annotations

import pytest

from baton.core import metrics as series
from baton.core.lifecycle import EngineUse, Timeline
from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.request import FinishReason, RequestId
from baton.core.worker_info import Role, WorkerId
from baton.telemetry.metrics import Metrics
from services.router.admission.slo import SloTargets
from services.router.admission.ticket import Ticket
from services.router.placement.placement import Placement, PlacementKind
from services.router.requests.accounts import MAX_OWED, Accounts
from services.router.requests.request_record import RequestRecord, WorkerPart
from services.router.tenants.tenant_labels import MAX_TENANT_LABELS, OTHER, TenantLabels

PLACEMENT = Placement(
    PlacementKind.REMOTE_PREFILL, WorkerId("p0"), WorkerId("d0"), 0.0, "test", terms=()
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def accounts(metrics: Metrics) -> Accounts:
    return Accounts(metrics, TenantLabels())


def values(metrics: Metrics, family: series.Series) -> dict[tuple[str, ...], float]:
    return dict(metrics._values[family.name])


def ended_record(
    *,
    finish: FinishReason | None = FinishReason.LENGTH,
    ttft_s: float = 0.5,
    parts: tuple[WorkerPart, ...] = (),
) -> RequestRecord:
    record = RequestRecord(RequestId("r"), "m", 100, tenant="acme")
    record.timeline = Timeline({Event.ARRIVED: 10.0, Event.FIRST_TOKEN: 10.0 + ttft_s})
    record.num_output_tokens, record.last_token_at_s = 11, 11.5
    record.num_cached_tokens = 64
    record.finish_reason = finish
    record.placements.append(PLACEMENT)
    record.parts += parts
    return record


def part(name: str, role: Role, seconds: float) -> WorkerPart:
    return WorkerPart(
        WorkerId(name), role, role is Role.PREFILL, Timeline(engine=EngineUse(seconds, 3)), 12.0
    )


def ticket(**targets: float) -> Ticket:
    return Ticket(tenant="acme", cost_tokens=1.0, slo_class="fast", targets=SloTargets(**targets))


def test_tenant_is_charged_for_tokens_and_for_measured_engine_time_of_each_pool(metrics, accounts):
    record = ended_record(
        parts=(part("p0", Role.PREFILL, 0.25), part("d0", Role.DECODE, 0.5),
               part("d1", Role.DECODE, 1.0))
    )  # fmt: skip
    accounts.ended(record, ticket())
    assert values(metrics, series.TENANT_REQUESTS) == {("acme",): 1}
    assert values(metrics, series.TENANT_PROMPT_TOKENS) == {("acme",): 100}
    assert values(metrics, series.TENANT_CACHED_TOKENS) == {("acme",): 64}
    assert values(metrics, series.TENANT_GENERATION_TOKENS) == {("acme",): 11}
    engine = values(metrics, series.TENANT_ENGINE)
    assert engine == {("acme", "prefill"): 0.25, ("acme", "decode"): 1.5}


@pytest.mark.parametrize("finish", [FinishReason.CANCELLED, FinishReason.ERROR, None])
def test_request_that_did_not_end_well_is_charged_and_no_goodput(metrics, accounts, finish):
    accounts.ended(ended_record(finish=finish, parts=(part("d0", Role.DECODE, 2.0),)), ticket())
    assert values(metrics, series.TENANT_ENGINE) == {("acme", "decode"): 2.0}
    assert values(metrics, series.GOODPUT_REQUESTS) == {}


def test_request_that_was_never_placed_is_not_charged(metrics, accounts):
    record = ended_record(finish=FinishReason.ERROR)
    record.placements.clear()
    accounts.ended(record, ticket())
    assert values(metrics, series.TENANT_REQUESTS) == {}


@pytest.mark.parametrize(
    ("targets", "is_good"),
    [({}, True), ({"ttft_s": 1.0}, True), ({"ttft_s": 0.4}, False), ({"itl_s": 0.05}, False),
     ({"ttft_s": 1.0, "itl_s": 0.2}, True)],
)  # fmt: skip
def test_goodput_is_what_missed_no_target(metrics, accounts, targets, is_good):
    accounts.ended(ended_record(), ticket(**targets))
    assert values(metrics, series.GOODPUT_REQUESTS) == ({("m", "fast"): 1} if is_good else {})
    assert values(metrics, series.GOODPUT_TOKENS) == ({("m", "fast"): 11} if is_good else {})


def test_late_use_goes_to_the_tenant_whose_request_it_was(metrics, accounts):
    accounts.left(ended_record(), "r.1")
    accounts.late_use("r.1", Role.DECODE, EngineUse(0.5, 4))
    accounts.late_use("r.1", Role.PREFILL, EngineUse(0.25, 4))
    accounts.late_use("nobody's", Role.DECODE, EngineUse(9.0, 4))
    assert values(metrics, series.TENANT_ENGINE) == {
        ("acme", "decode"): 0.5, ("acme", "prefill"): 0.25,
    }  # fmt: skip


def test_owed_uses_are_bounded(metrics, accounts):
    for i in range(MAX_OWED + 10):
        accounts.left(ended_record(), f"r.{i}")
    accounts.late_use("r.0", Role.DECODE, EngineUse(1.0, 1))
    assert values(metrics, series.TENANT_ENGINE) == {}
    accounts.late_use(f"r.{MAX_OWED}", Role.DECODE, EngineUse(1.0, 1))
    assert values(metrics, series.TENANT_ENGINE) == {("acme", "decode"): 1.0}
    assert len(accounts._owed) == MAX_OWED


def test_counters_of_a_tenant_are_there_from_its_first_request(metrics, accounts):
    accounts.started(ended_record())
    assert values(metrics, series.TENANT_PROMPT_TOKENS) == {("acme",): 0}
    assert values(metrics, series.TENANT_ENGINE) == {
        ("acme", "prefill"): 0, ("acme", "decode"): 0,
    }  # fmt: skip


def test_tenants_have_few_labels_and_keep_them():
    labels = TenantLabels(["named"])
    first = [labels.label(f"t{i}") for i in range(MAX_TENANT_LABELS + 5)]
    assert first[: MAX_TENANT_LABELS - 1] == [f"t{i}" for i in range(MAX_TENANT_LABELS - 1)]
    assert set(first[MAX_TENANT_LABELS - 1 :]) == {OTHER}
    assert [labels.label(f"t{i}") for i in range(MAX_TENANT_LABELS + 5)] == first
    assert labels.label("named") == "named" and labels.label("x" * 500) == OTHER
    assert len(labels.known) == MAX_TENANT_LABELS + 1
    assert TenantLabels().label("") == "anonymous"
