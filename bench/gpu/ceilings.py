"""What this card allows, measured in the run that quotes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.gpu.timing import Call, time_in_turns


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Limits of the card."""

    copy_bytes_per_s: float
    """Device-to-device copy, bytes read plus bytes written."""
    read_bytes_per_s: float
    """A sum over memory far larger than the caches."""
    bf16_flops_per_s: float
    """Product of two random bfloat16 matrices of 8192 x 8192."""
    measured_fp8_flops_per_s: float | None = None
    """The same of e4m3 matrices; None where torch cannot multiply them."""

    @property
    def fp8_flops_per_s(self) -> float:
        """Twice bfloat16's, as the data sheet has it, where it was not measured."""
        return self.measured_fp8_flops_per_s or 2 * self.bf16_flops_per_s


def measure_ceilings(*, copy_bytes: int = 4 << 30, matmul_size: int = 8192) -> Ceilings:
    """Takes about a second and 3 * `copy_bytes` of memory."""
    source = torch.randn(copy_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    left, right = (
        torch.randn(matmul_size, matmul_size, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    product = torch.empty_like(left)
    contenders: dict[str, list[Call]] = {
        # In a graph, copy_ would be left to a copy engine, which reaches 0.6 of what kernels do.
        "copy": [lambda: torch.mul(source, 1.0, out=target)],
        "read": [lambda: source.sum()],
        "matmul": [lambda: torch.mm(left, right, out=product)],
    }
    left_fp8, right_fp8 = (side.to(torch.float8_e4m3fn) for side in (left, right))
    one = torch.ones((), device="cuda")

    def multiply_fp8() -> object:
        return torch._scaled_mm(
            left_fp8, right_fp8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    if _works(multiply_fp8):
        contenders["fp8 matmul"] = [multiply_fp8]
    times = time_in_turns(contenders)
    num_bytes = source.numel() * source.element_size()
    flops = 2 * matmul_size**3
    fp8 = times.get("fp8 matmul")
    return Ceilings(
        copy_bytes_per_s=2 * num_bytes / times["copy"].median_s,
        read_bytes_per_s=num_bytes / times["read"].median_s,
        bf16_flops_per_s=flops / times["matmul"].median_s,
        measured_fp8_flops_per_s=None if fp8 is None else flops / fp8.median_s,
    )


def _works(call: Call) -> bool:
    try:
        call()
    except (RuntimeError, ValueError):
        return False
    return True
