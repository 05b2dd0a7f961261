"""Every kernel at real models' shapes compiles for Hopper as intended; needs no GPU.

The shapes are the CASES of the files hopper_cases_*.py beside this one, compiled by one process a
file (tests/support/hopper_report.py, which says what such a file may define). `make test` takes
the quick cases of each file, `make test-slow` all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from compiler_process import run_compiling
from hopper_report import load_cases

HERE = Path(__file__).parent
CASE_FILES = sorted(HERE.glob("hopper_cases_*.py"))
MAX_SHARED_BYTES = 227 * 1024
NUM_QUICK_CASES = 12
"""Of a file that does not name its own: evenly spread over its list."""


def quick_cases(module: ModuleType) -> list[str]:
    names = list(module.CASES)
    if hasattr(module, "QUICK_CASES"):
        return [name for name in names if name in module.QUICK_CASES]
    return names[:: -(-len(names) // NUM_QUICK_CASES)]


def compile_cases(path: Path, names: list[str], timeout_s: float) -> list[dict[str, Any]]:
    printed = run_compiling("hopper_report.py", path, text="\n".join(names), timeout_s=timeout_s)
    results = [json.loads(line) for line in printed.splitlines()]
    assert [result["case"] for result in results] == names
    return results


def problems_of(kernel: dict[str, Any], case: str, module: ModuleType) -> Iterator[str]:
    where = f"{case}: {kernel['name']}"
    allowed = getattr(module, "ALLOWED_SPILL_BYTES", {}).get(case, 0)
    if kernel["spill_bytes"] > allowed:
        yield f"{where} spills {kernel['spill_bytes']} bytes a thread; {allowed} are allowed"
    if kernel["shared_bytes"] > MAX_SHARED_BYTES:
        yield f"{where} takes {kernel['shared_bytes']} bytes of shared memory"
    if case in getattr(module, "EXPECTS_WIDE_ACCESSES", ()) and not (
        kernel["num_wide_loads"] and kernel["num_wide_stores"]
    ):
        yield f"{where} does not load and store 16 bytes at a time"
    if case in getattr(module, "EXPECTS_GMMA", ()) and kernel["num_legacy_tensor_core_ops"]:
        yield f"{where} uses HMMA, the slower path"


def check(path: Path, *, only_quick: bool, timeout_s: float) -> None:
    module = load_cases(path)
    names = quick_cases(module) if only_quick else list(module.CASES)
    problems = []
    for result in compile_cases(path, names, timeout_s):
        print(json.dumps(result))
        case, kernels = result["case"], result.get("kernels", [])
        if "error" in result:
            problems.append(f"{case}: {result['error']}")
        elif not kernels:
            problems.append(f"{case}: launches no kernel")
        elif case in getattr(module, "EXPECTS_GMMA", ()) and not any(
            kernel["num_tensor_core_ops"] for kernel in kernels
        ):
            problems.append(f"{case}: no kernel uses warp-group tensor-core instructions")
        for kernel in kernels:
            problems += problems_of(kernel, case, module)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", CASE_FILES, ids=lambda path: path.stem)
def test_quick_cases_compile_as_intended(path: Path) -> None:
    check(path, only_quick=True, timeout_s=280)


@pytest.mark.slow
@pytest.mark.timeout(3700)
@pytest.mark.parametrize("path", CASE_FILES, ids=lambda path: path.stem)
def test_all_cases_compile_as_intended(path: Path) -> None:
    check(path, only_quick=False, timeout_s=3600)


@pytest.mark.parametrize("path", CASE_FILES, ids=lambda path: path.stem)
def test_expectations_name_cases(path: Path) -> None:
    module = load_cases(path)
    for name in ("ALLOWED_SPILL_BYTES", "EXPECTS_GMMA", "EXPECTS_WIDE_ACCESSES", "QUICK_CASES"):
        assert set(getattr(module, name, ())) <= module.CASES.keys(), f"{name} names no case"
