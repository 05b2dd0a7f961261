"""Classes of service: settings, names, targets, outcomes."""

from __future__ import annotations

import pytest

from baton.core.errors import ConfigError, InvalidRequest
from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.slo import (
    NO_TARGETS,
    SloResult,
    SloTargets,
    class_named,
    class_targets,
    result,
    target_from_ms,
)
from services.router.admission.slo_config import SloClass, SloConfig
from services.router.config import load_router_config
from services.router.tenants.tenants_config import TenantConfig, TenantsConfig

SLO = SloConfig()


def test_default_class_promises_nothing_so_nobody_is_refused_for_a_slow_machine():
    assert class_targets(SLO, "") == NO_TARGETS == class_targets(SLO, SLO.default_class)
    assert class_named(SLO, "", param="p") == "standard"


def test_classes_come_from_settings_by_name(tmp_path):
    config = load_router_config(
        environ={
            "BATON_SLO__CLASSES__FAST__TTFT_S": "0.3",
            "BATON_SLO__CLASSES__FAST__ITL_S": "0.02",
            "BATON_SLO__CLASSES__SLOW__PRIORITY": "7",
            "BATON_SLO__DEFAULT_CLASS": "slow",
            "BATON_TENANTS__NAMED__ACME__WEIGHT": "3",
        },
        overrides={"model_path": str(tmp_path)},
    )
    assert config.slo.classes == {"fast": SloClass(0.3, 0.02), "slow": SloClass(priority=7)}
    assert config.tenants.named["acme"].weight == 3.0


def test_unknown_class_is_refused_with_the_names_there_are():
    with pytest.raises(InvalidRequest, match="batch, interactive, standard") as error:
        class_named(SLO, "x" * 500, param="X-SLO-Class")
    assert error.value.param == "X-SLO-Class" and len(str(error.value)) < 200


@pytest.mark.parametrize("text", ["abc", "0", "-1", "nan", "inf", "1e99", "1;2"])
def test_target_that_is_no_time_is_refused(text):
    with pytest.raises(InvalidRequest, match="milliseconds above 0"):
        target_from_ms(text, param="X-SLO-TTFT-Ms")


def test_targets_in_milliseconds():
    assert target_from_ms("250", param="p") == 0.25
    assert target_from_ms("", param="p") is None


@pytest.mark.parametrize(
    ("targets", "ttft_s", "itl_s", "expected", "is_met"),
    [
        (NO_TARGETS, 9.0, 9.0, SloResult(None, None), None),
        (SloTargets(1.0, 0.1), 0.9, 0.05, SloResult(True, True), True),
        (SloTargets(1.0, 0.1), 1.1, 0.05, SloResult(False, True), False),
        (SloTargets(1.0, 0.1), 0.5, 0.2, SloResult(True, False), False),
        (SloTargets(1.0, 0.1), 0.5, None, SloResult(True, None), True),
        (SloTargets(1.0, 0.1), None, None, SloResult(False, False), False),
        (SloTargets(None, 0.1), None, None, SloResult(None, False), False),
    ],
)
def test_outcome(targets, ttft_s, itl_s, expected, is_met):
    outcome = result(targets, ttft_s=ttft_s, mean_itl_s=itl_s)
    assert outcome == expected and outcome.is_met is is_met


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: SloClass(ttft_s=0), "ttft_s"),
        (lambda: SloClass(itl_s=float("nan")), "itl_s"),
        (lambda: SloClass(priority=101), "priority"),
        (lambda: SloConfig(classes={}), "1 to 32"),
        (lambda: SloConfig(classes={"a b": SloClass()}, default_class="a b"), "no name"),
        (lambda: SloConfig(default_class="none"), "batch, interactive, standard"),
        (lambda: AdmissionConfig(max_queued_requests=0), "max_queued_requests"),
        (lambda: AdmissionConfig(shed_ratio=1.5), "shed_ratio"),
        (lambda: AdmissionConfig(output_token_cost=-1), "output_token_cost"),
        (lambda: AdmissionConfig(output_token_cost=float("inf")), "output_token_cost"),
        (lambda: AdmissionConfig(max_ahead_s=float("nan")), "max_ahead_s"),
        (lambda: TenantConfig(weight=0), "weight"),
        (lambda: TenantConfig(max_concurrent=0), "max_concurrent"),
        (lambda: TenantsConfig(named={"": TenantConfig()}), "tenant name"),
        (lambda: TenantsConfig(require_key=True, trust_tenant_header=True), "both set"),
    ],
)
def test_wrong_settings_are_refused(build, reason):
    with pytest.raises(ConfigError, match=reason):
        build()
