"""Machines as two limits each: FLOP/s by dtype and bytes/s of memory. Named, or measured here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from baton.core.errors import ConfigError

MEASURED = "measure"
READ_BYTES = 512 << 20
"""Far above any cache, so that the read comes from memory."""
MATMUL_SIZE = 2048
MATMUL_ROWS = 512
MEASURE_S = 1.0
"""Per limit; the best repetition counts, so other load on the machine matters less."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Peak figures; dense, without sparsity."""

    name: str
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    """By dtype. float32 is without the reduced precision of TF32."""
    source: str
    memory_bytes: float | None = None
    link_bytes_per_s: float | None = None
    """To another device of the same host, one way."""

    def flops_for(self, dtype: str) -> float:
        """Raises ConfigError when the figure is not known."""
        if dtype not in self.flops_per_s:
            known = ", ".join(self.flops_per_s)
            raise ConfigError(f"machine {self.name} has no figure for {dtype}; known: {known}")
        return self.flops_per_s[dtype]


def _gpu(
    name: str,
    *,
    gb_per_s: float,
    half_tflops: float,
    float_tflops: float,
    memory_gb: float,
    link_gb_per_s: float,
) -> Machine:
    half, single = half_tflops * 1e12, float_tflops * 1e12
    return Machine(
        name=name,
        bytes_per_s=gb_per_s * 1e9,
        flops_per_s={"bfloat16": half, "float16": half, "float32": single},
        source="vendor's data sheet",
        memory_bytes=memory_gb * 1e9,
        link_bytes_per_s=link_gb_per_s * 1e9,
    )


MACHINES = (
    # https://www.nvidia.com/en-us/data-center/h200/ (SXM; tensor figures there are with sparsity)
    _gpu(
        "h200", gb_per_s=4800, half_tflops=989.5, float_tflops=67, memory_gb=141, link_gb_per_s=450
    ),
    # https://www.nvidia.com/en-us/data-center/h100/ (SXM)
    _gpu(
        "h100", gb_per_s=3350, half_tflops=989.5, float_tflops=67, memory_gb=80, link_gb_per_s=450
    ),
    # https://www.nvidia.com/en-us/data-center/a100/ (SXM, 80 GB)
    _gpu(
        "a100", gb_per_s=2039, half_tflops=312, float_tflops=19.5, memory_gb=80, link_gb_per_s=300
    ),
    # https://www.nvidia.com/en-us/data-center/l4/
    _gpu("l4", gb_per_s=300, half_tflops=121, float_tflops=30.3, memory_gb=24, link_gb_per_s=32),
    Machine(
        name="cpu-2core",
        bytes_per_s=44e9,
        flops_per_s={"bfloat16": 1.0e12, "float32": 0.22e12},
        source="an example: two cores with AVX512-BF16 of a cloud machine, measured",
    ),
)


def find_machine(name: str) -> Machine:
    """Raises ConfigError listing what there is."""
    for machine in MACHINES:
        if machine.name == name:
            return machine
    known = ", ".join(machine.name for machine in MACHINES)
    raise ConfigError(f"unknown machine {name!r}; known: {known}; or {MEASURED!r} for this one")


def measure(dtype: str, *, on_step: Callable[[str], None] = lambda step: None) -> Machine:
    """This machine's CPU, with all cores this process may use. Takes about three seconds.

    `on_step` is told what is being measured.
    """
    import torch

    on_step("reading memory")
    bytes_per_s = _read_bytes_per_s()
    on_step(f"multiplying {dtype} matrices")
    return Machine(
        name="this machine",
        bytes_per_s=bytes_per_s,
        flops_per_s={dtype: _matmul_flops_per_s(dtype)},
        source=f"measured with {torch.get_num_threads()} threads",
    )


def _read_bytes_per_s() -> float:
    import torch

    # Integer sums: float ones are limited by the adders, not by the memory.
    words = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return READ_BYTES / _best_s(words.sum)


def _matmul_flops_per_s(dtype: str) -> float:
    import torch

    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    rows = torch.ones(MATMUL_ROWS, MATMUL_SIZE, dtype=kinds[dtype])
    square = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=kinds[dtype])
    flops = 2 * MATMUL_ROWS * MATMUL_SIZE * MATMUL_SIZE
    return flops / _best_s(lambda: torch.matmul(rows, square))


def _best_s(work: Callable[[], object]) -> float:
    """The shortest of as many repetitions as fit in MEASURE_S, at least three."""
    work()
    best_s, repetitions, end_s = float("inf"), 0, time.perf_counter() + MEASURE_S
    while repetitions < 3 or time.perf_counter() < end_s:
        start_s = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - start_s)
        repetitions += 1
    return best_s
