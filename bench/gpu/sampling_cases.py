"""From logits of Llama-3's vocabulary to tokens, beside the same in torch operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.gpu.cases import OURS, Bound, Case, PlannedCase, Scale
from bench.gpu.shapes import LLAMA_3_1_8B
from bench.gpu.timing import Call
from kernels.sampling import sample
from kernels.sampling_reference import sample_reference
from kernels.sampling_rows import (
    PROMPT_BIT,
    ROW_DTYPE,
    RowFlag,
    SampledRows,
    SamplingPath,
    SamplingState,
    SamplingWorkspace,
)

SAMPLING = "sampling"
ROWS = (64, 256, 8, 1)
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95
REPETITION, FREQUENCY, PRESENCE = 1.1, 0.2, 0.1
NUM_TOP = 20
LOGITS_STD = 3.0
MAX_EDITS = 16


class Request(Enum):
    """What every row of a batch asks for."""

    GREEDY = "greedy"
    TOP_K_TOP_P = "top-k + top-p"
    PENALTIES = "penalties + draw"
    LOGPROBS = "greedy + 20 logprobs"

    @property
    def flags(self) -> RowFlag:
        return {
            Request.GREEDY: RowFlag(0),
            Request.TOP_K_TOP_P: RowFlag.DRAWS | RowFlag.FILTERS,
            Request.PENALTIES: RowFlag.DRAWS | RowFlag.ADJUSTS | RowFlag.COUNTS,
            Request.LOGPROBS: RowFlag.LOGPROBS,
        }[self]

    @property
    def error_limit(self) -> float:
        """Share of rows whose token may differ: sums in float64 and in integers may part at the
        edge of a token's share of the distribution."""
        return 0.02 if RowFlag.DRAWS in self.flags else 0.0


def sampling_cases(scale: Scale) -> Iterator[PlannedCase]:
    for num_rows in ROWS:
        for request in Request:
            name = f"{request.value} {num_rows} x {LLAMA_3_1_8B.vocab_size}"
            size = scale.upto(num_rows, 3), scale.upto(LLAMA_3_1_8B.vocab_size, 9000)
            yield PlannedCase(SAMPLING, name, partial(sampling_case, scale, name, request, *size))


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """A step's logits and parameters; counts of penalised rows grow with every call."""

    logits: Tensor
    state: SamplingState
    workspace: SamplingWorkspace
    path: SamplingPath
    last_tokens: Tensor
    out: SampledRows

    def run(self) -> None:
        sample(
            self.logits,
            state=self.state,
            workspace=self.workspace,
            path=self.path,
            last_tokens=self.last_tokens,
            out=self.out,
        )

    def error(self) -> float:
        """Share of rows whose tokens, or alternatives' ids, differ from the reference's."""
        num_rows = len(self.logits)
        expected = SampledRows.allocate(num_rows, self.logits.device)
        counts = self.state.token_counts.clone()
        sample_reference(
            self.logits,
            state=dataclasses.replace(self.state, token_counts=counts),
            last_tokens=self.last_tokens.clone(),
            out=expected,
        )
        self.out.token_ids.fill_(-1)
        self.run()
        is_wrong = self.out.token_ids != expected.token_ids
        if self.path.top_logprobs:
            is_wrong |= (self.out.top_ids != expected.top_ids)[:, :NUM_TOP].any(dim=-1)
            distance = (self.out.top_logprobs - expected.top_logprobs)[:, :NUM_TOP].abs()
            is_wrong |= ~(distance.amax(dim=-1) < 1e-3)
        return float(is_wrong.float().mean())


def sampling_inputs(
    scale: Scale, request: Request, num_rows: int, vocab_size: int
) -> SamplingInputs:
    device = scale.device
    state = SamplingState.allocate(vocab_size, num_rows, num_rows, MAX_EDITS, device)
    records = _records(request, num_rows)
    state.rows.copy_(torch.from_numpy(records.view(np.int32).reshape(num_rows, -1)))
    # A prompt of a thousand tokens, some of which the output repeats.
    seen = torch.randint(0, vocab_size, (num_rows, min(1000, vocab_size)), device=device)
    state.token_counts.scatter_(1, seen, PROMPT_BIT + 1)
    num_top = NUM_TOP if request is Request.LOGPROBS else 0
    return SamplingInputs(
        logits=scale.randn(num_rows, vocab_size) * LOGITS_STD,
        state=state,
        workspace=SamplingWorkspace.allocate(vocab_size, num_rows, device),
        path=SamplingPath.of(int(request.flags), num_top),
        last_tokens=torch.zeros(num_rows, dtype=torch.int64, device=device),
        out=SampledRows.allocate(num_rows, device),
    )


def _records(request: Request, num_rows: int) -> np.ndarray:
    records = np.zeros(num_rows, dtype=ROW_DTYPE)
    records["slot"] = np.arange(num_rows)
    records["flags"] = int(request.flags)
    records["temperature"] = TEMPERATURE
    records["min_p_distance"] = np.inf
    records["repetition_penalty"] = 1.0
    records["top_p"] = 1.0
    words = np.random.default_rng(0).integers(0, 1 << 53, num_rows, dtype=np.uint64)
    records["random"] = words << np.uint64(11)
    if request is Request.TOP_K_TOP_P:
        records["top_k"], records["top_p"] = TOP_K, TOP_P
    if request is Request.PENALTIES:
        records["repetition_penalty"] = REPETITION
        records["frequency_penalty"] = FREQUENCY
        records["presence_penalty"] = PRESENCE
    if request is Request.LOGPROBS:
        records["num_top"] = NUM_TOP
    return records


def torch_greedy(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def torch_draw(scores: Tensor) -> Tensor:
    """By the race of exponential variables, which needs no synchronisation."""
    weights = torch.softmax(scores, dim=-1)
    return weights.div_(torch.empty_like(weights).exponential_()).argmax(dim=-1)


def torch_top_k_top_p(logits: Tensor) -> Tensor:
    scores, order = (logits.float() / TEMPERATURE).sort(dim=-1, descending=True)
    scores[:, TOP_K:] = float("-inf")
    mass = torch.softmax(scores, dim=-1).cumsum(dim=-1)
    scores[:, 1:].masked_fill_(mass[:, :-1] >= TOP_P, float("-inf"))
    return order.gather(1, torch_draw(scores)[:, None])[:, 0]


def torch_penalties(logits: Tensor, token_counts: Tensor) -> Tensor:
    scores = logits.float()
    counts = (token_counts & (PROMPT_BIT - 1)).float()
    penalised = torch.where(scores > 0, scores / REPETITION, scores * REPETITION)
    penalised = penalised - FREQUENCY * counts - PRESENCE * (counts > 0)
    scores = torch.where(token_counts != 0, penalised, scores)
    return torch_draw(scores / TEMPERATURE)


def torch_logprobs(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best, ids = logprobs.topk(NUM_TOP, dim=-1)
    return logits.argmax(dim=-1), best, ids


def sampling_case(
    scale: Scale, name: str, request: Request, num_rows: int, vocab_size: int
) -> Case:
    """Bytes are those of the logits, and of the counts where they are looked at."""
    is_counted = request is Request.PENALTIES
    num_bytes = num_rows * vocab_size * (2.0 + 4.0 * is_counted)
    inputs = [
        sampling_inputs(scale, request, num_rows, vocab_size)
        for _ in range(scale.num_input_sets(int(num_bytes)))
    ]
    contenders: dict[str, list[Call]] = {OURS: [one.run for one in inputs]}
    if scale.has_peers:
        contenders["torch"] = [_torch_call(request, one) for one in inputs]
    return Case(
        group=SAMPLING,
        name=name,
        num_bytes=num_bytes,
        flops=float(num_rows * vocab_size),
        bound=Bound.READ,
        contenders=contenders,
        error=inputs[0].error,
        error_limit=request.error_limit,
    )


def _torch_call(request: Request, inputs: SamplingInputs) -> Call:
    if request is Request.PENALTIES:
        return partial(torch_penalties, inputs.logits, inputs.state.token_counts)
    function = {
        Request.GREEDY: torch_greedy,
        Request.TOP_K_TOP_P: torch_top_k_top_p,
        Request.LOGPROBS: torch_logprobs,
    }[request]
    return partial(function, inputs.logits)
