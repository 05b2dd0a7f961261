"""What a kernel benchmark measures: one operation at one size, ours beside its peers.

Cases are planned first, by name, and built one at a time, so that only one holds memory and what
a run left out can be listed. Not known here: how calls are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from bench.gpu.ceilings import Ceilings
from bench.gpu.timing import Call, num_input_sets

OURS = "baton"
OURS_PDL = "baton pdl"
"""The same kernels, each starting while the one before ends, as the engine launches them."""

ERROR_LIMITS = {
    # Half a unit in the last place of operands and result, and room for cancelling sums.
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
    torch.float32: 1e-4,
}
"""Largest error of a result of this dtype, by `relative_error`."""


class Bound(Enum):
    """Which ceiling of the card a case is held against."""

    COPY = "copy"
    READ = "read"
    MATMUL = "matmul"
    FP8_MATMUL = "fp8 matmul"

    @property
    def is_compute(self) -> bool:
        return self in (Bound.MATMUL, Bound.FP8_MATMUL)


@dataclass(frozen=True, slots=True)
class Case:
    """Contenders compute the same on inputs of their own; each gives one call per input set."""

    group: str
    name: str
    num_bytes: float
    """Bytes that must move: every input read once, every output written once."""
    flops: float
    bound: Bound
    contenders: Mapping[str, Sequence[Call]]
    error: Callable[[], float]
    """Runs ours on the first of the inputs that are timed, and says how far off it is."""
    error_limit: float

    def limit_s(self, ceilings: Ceilings) -> float:
        """Seconds at the ceiling the case is held against."""
        if self.bound is Bound.MATMUL:
            return self.flops / ceilings.bf16_flops_per_s
        if self.bound is Bound.FP8_MATMUL:
            return self.flops / ceilings.fp8_flops_per_s
        if self.bound is Bound.READ:
            return self.num_bytes / ceilings.read_bytes_per_s
        return self.num_bytes / ceilings.copy_bytes_per_s


@dataclass(frozen=True, slots=True)
class PlannedCase:
    """A case that takes no memory yet."""

    group: str
    name: str
    build: Callable[[], Case]


@dataclass(frozen=True, slots=True)
class Scale:
    """Where cases are built, and how large."""

    device: torch.device
    is_tiny: bool = False
    """Sizes that Triton's interpreter walks through in well under a second."""
    max_input_sets: int = 64
    has_peers: bool = True

    def upto(self, size: int, tiny: int) -> int:
        """`size`, or at most `tiny` of it."""
        return min(size, tiny) if self.is_tiny else size

    def num_input_sets(self, num_bytes: int) -> int:
        if self.is_tiny:
            return 1
        return min(self.max_input_sets, num_input_sets(num_bytes))

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16).to(dtype)


GPU_SCALE = Scale(torch.device("cuda"))
TINY_SCALE = Scale(torch.device("cpu"), is_tiny=True)
CasePlanner = Callable[[Scale], Iterator[PlannedCase]]
"""Lists the cases of one group, the most telling first."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The worst row's |actual - expected| / |expected|, rows along the last dimension.

    By rows, so that one wrong row among thousands shows. NaN where a result is.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"result is {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    wanted = expected.float()
    distances = torch.linalg.vector_norm(actual.float() - wanted, dim=-1)
    lengths = torch.linalg.vector_norm(wanted, dim=-1).clamp_min(1e-20)
    return float((distances / lengths).max())


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN if one is, which `max` may pass over."""
    return float(torch.tensor(list(errors)).max())


def compiled_peer(function: Callable[..., object]) -> Callable[..., object]:
    """By torch.compile for the shapes of one case; what was compiled for others is forgotten."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)
