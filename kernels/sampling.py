"""Sampling of a whole step on the device: logits in, one token per row out.

    logits ─► score ─┬─► weigh [─► gather ─► threshold ─► reweigh] ─┬─► draw ─► token ids
                     └──────────── every row greedy ────────────────┘
             └─► top_logprobs, where alternatives are wanted

logits [num_rows, vocab_size] in bfloat16, float16 or float32, left unchanged; rows may be strided,
logits of a row are adjacent. Parameters of rows and slots come from a SamplingState; which kernels
run depends on the path and the shape alone, so a step can be captured in a CUDA graph. A row is cut
into chunks of one program each, and every stage ends in a number per chunk, so one row of a large
vocabulary is spread over the device like many rows.

Two runs give equal results, and a row's result does not depend on the other rows of the batch.

Bytes: vocab_size * itemsize a row when greedy; see the stages for the rest.
Limits: vocab_size up to 2^20; num_rows * row stride may pass 2^31 elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.platform import is_interpreted, runs_triton
from kernels.sampling_draw import draw
from kernels.sampling_logprobs import top_logprobs
from kernels.sampling_reference import sample_reference
from kernels.sampling_rows import SampledRows, SamplingPath, SamplingState, SamplingWorkspace
from kernels.sampling_scores import score
from kernels.sampling_threshold import find_thresholds
from kernels.sampling_weights import reweigh, weigh

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sample(
    logits: Tensor,
    *,
    state: SamplingState,
    workspace: SamplingWorkspace,
    path: SamplingPath,
    last_tokens: Tensor,
    out: SampledRows,
    launch_pdl: bool = False,
) -> None:
    """Sample for the rows described by the first records of `state.rows`.

    Writes `out`; `last_tokens` [num_slots], int32 or int64, at the rows' slots; and the counts of
    rows with penalties. Of rows whose slot is -1 it writes token 0 to `out` and nothing else.
    Raises ValueError on what the kernels do not take.
    """
    _check(logits, state, workspace, last_tokens, out)
    if not logits.shape[0]:
        return
    if not runs_triton(logits):
        sample_reference(logits, state=state, last_tokens=last_tokens, out=out)
        return
    use_pdl = launch_pdl and not is_interpreted()
    score(logits, state=state, workspace=workspace, path=path, use_pdl=use_pdl)
    if path.top_logprobs:
        top_logprobs(logits, state=state, workspace=workspace, out=out, use_pdl=use_pdl)
    if path.draws:
        weigh(logits, state=state, workspace=workspace, use_pdl=use_pdl)
    if path.filters:
        shape = logits.shape
        find_thresholds(*shape, state=state, workspace=workspace, use_pdl=use_pdl)
        reweigh(*shape, state=state, workspace=workspace, use_pdl=use_pdl)
    draw(
        logits,
        state=state,
        workspace=workspace,
        path=path,
        last_tokens=last_tokens,
        out=out,
        use_pdl=use_pdl,
    )


def _check(
    logits: Tensor,
    state: SamplingState,
    workspace: SamplingWorkspace,
    last_tokens: Tensor,
    out: SampledRows,
) -> None:
    max_rows, vocab_size = state.rows.shape[0], state.token_counts.shape[1]
    if logits.dim() != 2 or logits.shape[1] != vocab_size or logits.shape[0] > max_rows:
        raise ValueError(
            f"logits are {list(logits.shape)}; give [num_rows, {vocab_size}], "
            f"num_rows up to {max_rows}, as the sampling state was allocated"
        )
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits are {logits.dtype}; give one of {', '.join(map(str, DTYPES))}")
    if logits.stride(1) != 1 and vocab_size > 1:
        raise ValueError(
            f"logits have column stride {logits.stride(1)}; make their rows contiguous"
        )
    num_slots = state.token_counts.shape[0]
    if last_tokens.shape != (num_slots,) or last_tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"last_tokens is {list(last_tokens.shape)} {last_tokens.dtype}; "
            f"give int32 or int64 [{num_slots}]"
        )
    if workspace.num_candidates.shape[0] < logits.shape[0]:
        raise ValueError(
            f"the workspace is for {workspace.num_candidates.shape[0]} rows; "
            f"allocate it for {logits.shape[0]}"
        )
    for name, tensor in (
        ("state", state.rows),
        ("workspace", workspace.scores),
        ("last_tokens", last_tokens),
        ("out", out.token_ids),
    ):
        if tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device}, logits on {logits.device}; move it")
