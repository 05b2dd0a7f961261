"""Fixtures of the kernel tests: the same tests run under the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_interpreter import complete_interpreter


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU's memory under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def completed_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    complete_interpreter(monkeypatch)


@pytest.fixture(autouse=True)
def nan_filled_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floating-point memory is NaN, also inside launchers, so unwritten rows show."""

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            # A fill between two launches would hide that the second does not wait for the first.
            if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
                return tensor
            # torch has no fill for 8-bit floats.
            if tensor.is_floating_point() and tensor.element_size() > 1:
                tensor.fill_(float("nan"))
            return tensor

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoning(Tensor.new_empty))
