"""The GPU engine with its requests and everything it has said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.core.clock import WallClock
from baton.core.request import GenerateRequest, RequestId, SamplingParams, TokenLogprobs, Work
from baton.engine.communicator import SingleCommunicator
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.gpu.build import build_gpu_rank
from baton.engine.gpu.device import ComputeDevice
from baton.engine.grammar.gate import Compiler


class Output:
    """What one engine said of its requests."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}

    def submit(
        self, name: str, prompt: Sequence[int], *, eos: tuple[int, ...] = (), **sampling: Any
    ) -> None:
        params = SamplingParams(**({"temperature": 0.0, "ignore_eos": not eos} | sampling))
        self.engine.submit(
            GenerateRequest(
                RequestId(name), Work.GENERATE, tuple(prompt), params, eos_token_ids=eos
            )
        )

    def run(self) -> None:
        while self.engine.has_work:
            for delta in self.engine.step().deltas:
                assert not delta.error, delta.error
                self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                self.logprobs.setdefault(delta.request_id, []).extend(delta.logprobs)
                if delta.prompt_logprobs:
                    assert delta.request_id not in self.prompt_logprobs, "told twice"
                    self.prompt_logprobs[delta.request_id] = list(delta.prompt_logprobs)
        self.engine.check_integrity()
        assert self.engine.is_empty


def gpu_engine(
    config: EngineConfig, device: ComputeDevice, grammars: Compiler | None = None
) -> Engine:
    rank = build_gpu_rank(config, communicator=SingleCommunicator(), device=device)
    return Engine(
        config=config,
        layout=rank.layout,
        num_blocks=rank.num_blocks,
        max_model_len=rank.max_model_len,
        runner=rank.runner,
        clock=WallClock(),
        vocab_size=rank.vocab_size,
        grammars=grammars,
    )
