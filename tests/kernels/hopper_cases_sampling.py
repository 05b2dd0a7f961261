"""Calls of the sampling launchers that the offline compile check runs, at serving shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kernels.sampling import sample
from kernels.sampling_counts import count_tokens
from kernels.sampling_rows import SampledRows, SamplingPath, SamplingState, SamplingWorkspace

VOCAB_SIZE = 128256
MAX_EDITS = 1536
PATHS = {
    "greedy": SamplingPath(is_full=False),
    "full": SamplingPath(is_full=True, draws=True, filters=True, top_logprobs=True),
    "gumbel": SamplingPath(is_full=True, gumbel=True),
}


def _sample(path: SamplingPath, num_rows: int, dtype: torch.dtype) -> None:
    device = torch.device("cpu")
    sample(
        torch.empty(num_rows, VOCAB_SIZE, dtype=dtype),
        state=SamplingState.allocate(VOCAB_SIZE, num_rows, num_rows, MAX_EDITS, device),
        workspace=SamplingWorkspace.allocate(VOCAB_SIZE, num_rows, device),
        path=path,
        last_tokens=torch.empty(num_rows, dtype=torch.int64),
        out=SampledRows.allocate(num_rows, device),
        launch_pdl=True,
    )


def _count() -> None:
    count_tokens(
        torch.empty(5000, dtype=torch.int32),
        slot=3,
        num_prompt_tokens=4000,
        token_counts=torch.empty(8, VOCAB_SIZE, dtype=torch.int32),
    )


CASES: dict[str, Callable[[], None]] = {
    f"{name}-{num_rows}-{str(dtype).removeprefix('torch.')}": partial(
        _sample, path, num_rows, dtype
    )
    for name, path in PATHS.items()
    for num_rows in (1, 8, 64, 256)
    for dtype in (torch.bfloat16, torch.float32)
} | {"count_tokens": _count}
