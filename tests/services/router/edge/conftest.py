"""A scripted dispatcher, and the edges served on real sockets in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import tokenizers
import uvloop
from tokenizers import decoders, models, pre_tokenizers, processors

from baton.core.request import FinishReason, TokenLogprobs
from baton.engine.tokenizer import Tokenizer
from baton.telemetry.metrics import Metrics
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.http_app import HttpApp
from services.router.edge.http_server import HttpServer
from services.router.requests.generation import (
    GenerationDelta,
    GenerationInput,
    Health,
    ModelCard,
    Usage,
)
from services.router.shared.state import QuotaLimits
from services.router.tenants.quota_hold import QuotaHold

MODEL = "tiny"
CONTEXT = 256
BOS, EOS = "<|bos|>", "<|eos|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """One token per byte (ids 0..255 in the order of the byte-level alphabet), then BOS, EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": BOS, "eos_token": EOS, "chat_template": CHAT_TEMPLATE})
    )


@dataclass
class ScriptedGenerator:
    """Answers every prompt with `reply` (or the prompt's own text), one token at a time."""

    tokenizer: Tokenizer
    reply: Callable[[GenerationInput], str]
    step_s: float = 0.0
    fail_at: int | None = None
    """Raise `error` instead of this output position."""
    error: BaseException | None = None
    is_ready: bool = True
    names: tuple[str, ...] = (MODEL,)
    started: list[GenerationInput] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    closed_early: list[str] = field(default_factory=list)
    num_yielded: int = 0

    def models(self) -> list[ModelCard]:
        return [ModelCard(name, CONTEXT, self.tokenizer, 1_700_000_000) for name in self.names]

    async def health(self) -> Health:
        return Health(self.is_ready, "scripted")

    async def hold_quota(self, tenant: str, limits: QuotaLimits) -> QuotaHold | None:
        return None

    async def generate(self, request: GenerationInput) -> AsyncIterator[Sequence[GenerationDelta]]:
        self.started.append(request)
        is_done = False
        try:
            async for delta in self._deltas(request):
                self.num_yielded += 1
                yield (delta,)
            is_done = True
        finally:
            (self.finished if is_done else self.closed_early).append(request.request_id)

    async def _deltas(self, request: GenerationInput) -> AsyncIterator[GenerationDelta]:
        ids = self.tokenizer.encode(self.reply(request), add_special_tokens=False)
        detokenizer = self.tokenizer.detokenizer()
        wanted = min(len(ids), request.sampling.max_tokens)
        is_cut = wanted < len(ids)
        if wanted == 0 and self.fail_at is None:
            yield self._last(request, 0, "", FinishReason.STOP)
        text, sent = "", 0
        for position in range(wanted if self.fail_at is None else self.fail_at + 1):
            if position == self.fail_at and self.error is not None:
                raise self.error
            await asyncio.sleep(self.step_s)
            piece = detokenizer.push([ids[position]])
            logprobs = self._logprobs(request, ids[position])
            text += piece
            stop = next((s for s in request.stop if s in text), None)
            if stop is not None:
                yield self._last(
                    request, position + 1, text[sent : text.index(stop)], FinishReason.STOP, stop
                )
                return
            held = max((len(s) - 1 for s in request.stop), default=0)
            upto = max(sent, len(text) - held)
            is_last = position == wanted - 1
            if is_last:
                text += detokenizer.flush()
                upto = len(text)
            piece, sent = text[sent:upto], upto
            yield GenerationDelta(
                piece,
                (ids[position],),
                logprobs,
                (FinishReason.LENGTH if is_cut else FinishReason.STOP) if is_last else None,
                None,
                self._usage(request, position + 1) if is_last else None,
            )

    def _last(
        self,
        request: GenerationInput,
        num_tokens: int,
        text: str,
        reason: FinishReason,
        stop: str | None = None,
    ) -> GenerationDelta:
        return GenerationDelta(text, (), (), reason, stop, self._usage(request, num_tokens))

    def _usage(self, request: GenerationInput, num_tokens: int) -> Usage:
        return Usage(len(request.prompt_token_ids), num_tokens, len(request.prompt_token_ids) // 2)

    def _logprobs(self, request: GenerationInput, token_id: int) -> tuple[TokenLogprobs, ...]:
        num_top = request.sampling.logprobs
        if num_top is None:
            return ()
        top = tuple(((token_id + i) % 256, -0.5 - i) for i in range(num_top))
        return (TokenLogprobs(token_id, -0.5, top),)

    async def until_idle(self, num_requests: int, timeout_s: float = 2.0) -> None:
        """Wait until that many requests have ended, one way or the other."""
        async with asyncio.timeout(timeout_s):
            while len(self.finished) + len(self.closed_early) < num_requests:
                await asyncio.sleep(0.005)


@dataclass
class Edge:
    """A served HTTP edge."""

    generator: ScriptedGenerator
    app: HttpApp
    server: HttpServer
    metrics: Metrics

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def fixed(text: str) -> Callable[[GenerationInput], str]:
    return lambda request: text


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


@pytest.fixture
def generator(tokenizer: Tokenizer) -> ScriptedGenerator:
    return ScriptedGenerator(tokenizer, fixed("Hello, world"))


@pytest.fixture
def edge_config() -> EdgeConfig:
    return EdgeConfig(max_body_bytes=256 << 10, stop_grace_s=0.05)


@contextlib.asynccontextmanager
async def served(generator: ScriptedGenerator, config: EdgeConfig) -> AsyncIterator[Edge]:
    metrics = Metrics()
    app = HttpApp(generator, metrics=metrics, config=config)
    server = HttpServer(app, host="127.0.0.1", port=0, config=config)
    await server.start()
    try:
        yield Edge(generator, app, server, metrics)
    finally:
        await server.stop()


@pytest.fixture
def serve_edge():
    """`served`, for tests that need an edge with settings of their own."""
    return served


@pytest.fixture
async def edge(generator: ScriptedGenerator, edge_config: EdgeConfig) -> AsyncIterator[Edge]:
    async with served(generator, edge_config) as edge:
        yield edge


@pytest.fixture
async def client(edge: Edge) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=edge.url, timeout=10, trust_env=False) as client:
        yield client


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> object:
    """The loop that serving uses."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def direct(
    generator: ScriptedGenerator, edge_config: EdgeConfig
) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the application without sockets; for the many cases of bad input."""
    app = HttpApp(generator, metrics=Metrics(), config=edge_config)
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        yield client
    app.close()
