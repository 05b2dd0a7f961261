"""Compiles cases of one file for Hopper and prints what became of them; a script for tests.

    hopper_report.py CASES_FILE < names, one a line

CASES_FILE defines CASES: dict[str, Callable[[], None]], each calling launchers on CPU tensors. It
may define QUICK_CASES: set[str], which stand for the others where time is short,
ALLOWED_SPILL_BYTES: dict[str, int] (bytes a thread, with the reason beside it), EXPECTS_GMMA:
set[str], and EXPECTS_WIDE_ACCESSES: set[str] (16-byte global loads and stores).

Run without TRITON_INTERPRET. Prints one JSON object a case and line: its name, and its kernels'
figures or its error.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from hopper_compiler import KernelReport, compile_for_hopper


def figures(report: KernelReport) -> dict[str, Any]:
    """The report without its machine code, of which the widest global accesses are counted."""
    values = asdict(report)
    sass = values.pop("sass")
    values["constants"] = {name: str(value) for name, value in report.constants.items()}
    values["num_wide_loads"] = len(re.findall(r"\bLDG(?:STS)?\.E[\w.]*\.128|\bUTMALDG", sass))
    values["num_wide_stores"] = len(re.findall(r"\bSTG\.E[\w.]*\.128|\bUTMASTG", sass))
    return values


def compile_case(call: Callable[[], None]) -> dict[str, Any]:
    try:
        return {"kernels": [figures(report) for report in compile_for_hopper(call)]}
    except Exception as error:
        return {"error": "".join(traceback.format_exception_only(error))}


def load_cases(path: Path) -> ModuleType:
    """The file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and compiled functions look their module up by its name.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    cases = load_cases(Path(sys.argv[1])).CASES
    for name in sys.stdin.read().splitlines():
        print(json.dumps({"case": name, **compile_case(cases[name])}), flush=True)


if __name__ == "__main__":
    main()
