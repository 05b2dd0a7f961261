"""Requests made after /openapi.json, right and wrong ones, for FUZZ_SECONDS: answers are those that
it promises."""

from __future__ import annotations

import time

import hypothesis
import pytest

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(0)]

ROUND_EXAMPLES = 15
TIMEOUT_S = 60.0


def test_answers_are_those_described(fuzzed, campaign):
    schemathesis = pytest.importorskip("schemathesis", reason="pip install -e '.[fuzz]'")
    from schemathesis import checks

    promised = [
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    schema = schemathesis.openapi.from_url(f"{fuzzed.system.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert operations
    print(f"\nFUZZ_SEED={campaign.seed} FUZZ_SECONDS={campaign.seconds:g}")
    ends_at_s = time.monotonic() + campaign.seconds
    number = campaign.only or 0
    while time.monotonic() < ends_at_s:
        for operation in operations:
            for mode in schemathesis.GenerationMode:
                seed = campaign.seed + number
                note = f"FUZZ_SEED={campaign.seed} FUZZ_CASE={number}: {operation.label}, {mode}"
                check(operation, mode, seed, promised, note)
        number += 1
        if campaign.only is not None:
            break
    print(f"{number} rounds of {len(operations)} operations")


def check(operation, mode, seed, promised, note):
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=ROUND_EXAMPLES,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def each(case):
        response = case.call(timeout=TIMEOUT_S)
        allowed = [
            c for c in promised if c is not promised[0] or response.status_code not in (501,)
        ]
        case.validate_response(response, checks=allowed)

    try:
        each()
    except hypothesis.errors.Unsatisfiable:
        # Nothing about this operation can be wrong.
        return
    except Exception as error:
        error.add_note(note)
        raise
