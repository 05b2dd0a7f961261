"""The GPU engine on whatever is there: a GPU, or Triton's interpreter on CPU memory."""

from __future__ import annotations

import pytest
import torch

from baton.engine.gpu.device import ComputeDevice, CudaDevice, InterpretedDevice
from triton_interpreter import complete_interpreter


@pytest.fixture(autouse=True)
def completed_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    complete_interpreter(monkeypatch)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def compute_device(device: torch.device) -> ComputeDevice:
    return CudaDevice(0) if device.type == "cuda" else InterpretedDevice()
