"""What the engine asks of a GPU: a stream, events, pinned memory; and the same without a GPU.

Triton's interpreter computes on CPU tensors while a kernel is called, so that there every step has
ended when its launch returns. Not known here: models, kernels, graphs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from baton.core.errors import ConfigError


class Event(Protocol):
    """A point in the stream."""

    def wait(self) -> None:
        """Block the calling thread until everything launched before the point has ended."""
        ...


class ComputeDevice(Protocol):
    """Where tensors live and kernels run. Used from the engine's thread alone."""

    @property
    def device(self) -> torch.device: ...
    @property
    def is_gpu(self) -> bool:
        """Kernels are compiled and run by themselves: graphs and dependent launches pay."""
        ...

    def stream(self) -> AbstractContextManager[object]:
        """Everything launched inside runs in order on the engine's own stream."""
        ...

    def record(self, *, sleeps: bool = False) -> Event:
        """`sleeps`: who waits for it leaves the core to others, and is woken a little later."""
        ...

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeroed host memory that copies to and from the device without a bounce."""
        ...

    def free_bytes(self) -> int:
        """Memory that can be allocated now, what the allocator holds unused included."""
        ...

    def total_bytes(self) -> int: ...


def check_gpu(index: int) -> None:
    """Raises ConfigError when this process has no GPU `index`, the one of that rank."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "device cuda was asked for, but torch finds no GPU "
            f"(torch {torch.__version__}); install a CUDA build of torch or use device cpu"
        )
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {index} needs GPU {index}, but {torch.cuda.device_count()} are visible; "
            "lower tp_size or make more GPUs visible"
        )


class CudaDevice:
    """One GPU of this process."""

    is_gpu = True

    def __init__(self, index: int) -> None:
        check_gpu(index)
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self._stream = torch.cuda.Stream(self.device)

    def stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def record(self, *, sleeps: bool = False) -> Event:
        event = torch.cuda.Event(blocking=sleeps)
        event.record(self._stream)
        return _CudaEvent(event)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + unused

    def total_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).total_memory)


class _CudaEvent:
    __slots__ = ("_event",)

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class InterpretedDevice:
    """CPU memory for kernels that Triton interprets: the GPU engine's tests on any machine."""

    is_gpu = False

    def __init__(self, total_bytes: int = 4 << 30) -> None:
        self.device = torch.device("cpu")
        self._total_bytes = total_bytes

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self, *, sleeps: bool = False) -> Event:
        return _PassedEvent()

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def free_bytes(self) -> int:
        return self._total_bytes

    def total_bytes(self) -> int:
        return self._total_bytes


class _PassedEvent:
    def wait(self) -> None:
        return
