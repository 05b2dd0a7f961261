"""The models that the live workers serve, and the longest prompts they take.

Does not know: requests in flight, placement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from baton.core.errors import ContextLengthExceeded, ModelNotFound
from baton.engine.tokenizer import Tokenizer
from services.router.requests.generation import GenerationInput, ModelCard
from services.router.workers.worker_pool import WorkerPool


class Catalogue:
    """One per router."""

    def __init__(
        self,
        pool: WorkerPool,
        tokenizers: Mapping[str, Tokenizer],
        wall_clock: Callable[[], float],
    ) -> None:
        """`tokenizers`: by model name."""
        self._pool = pool
        self._tokenizers = tokenizers
        self._wall_clock = wall_clock
        self._first_seen_s: dict[str, int] = {}

    def models(self) -> list[ModelCard]:
        lengths: dict[str, int] = {}
        for session in self._pool.sessions():
            info = session.info
            if info is None or not session.is_ready or info.model_name not in self._tokenizers:
                continue
            shortest = lengths.get(info.model_name, info.max_model_len)
            lengths[info.model_name] = min(shortest, info.max_model_len)
        now_s = int(self._wall_clock())
        return [
            ModelCard(
                name, length, self._tokenizers[name], self._first_seen_s.setdefault(name, now_s)
            )
            for name, length in sorted(lengths.items())
        ]

    def tokenizer_for(self, request: GenerationInput) -> Tokenizer:
        """Raises ModelNotFound, ContextLengthExceeded."""
        tokenizer = self._tokenizers.get(request.model)
        if tokenizer is None:
            raise ModelNotFound(
                f"model {request.model!r} does not exist; "
                f"served here: {', '.join(sorted(self._tokenizers))}",
                param="model",
            )
        self._check_length(request)
        return tokenizer

    def _check_length(self, request: GenerationInput) -> None:
        limits = [
            s.info.max_model_len
            for s in self._pool.sessions()
            if s.info is not None and s.info.model_name == request.model
        ]
        num_tokens = len(request.prompt_token_ids)
        if limits and num_tokens >= max(limits):
            raise ContextLengthExceeded(
                f"the prompt has {num_tokens} tokens, but the context of {max(limits)} tokens "
                "must hold it and at least one token of output; shorten the prompt",
                param="prompt",
            )
