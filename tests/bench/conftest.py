"""Benchmarks' cases run their kernels under the interpreter here."""

from __future__ import annotations

import pytest

from triton_interpreter import complete_interpreter


@pytest.fixture(autouse=True)
def completed_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    complete_interpreter(monkeypatch)
