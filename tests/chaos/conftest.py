"""Real processes with a tiny model whose KV is heavy, so that moving it takes time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from baton.core.clock import ManualClock
from baton.core.request import GenerateRequest, RequestId, SamplingParams, Work
from baton.core.tls import TlsFiles
from baton.core.worker_info import Role
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.factory import build_engine
from cluster import Cluster
from tiny_llama import write_checkpoint, write_pair_tokenizer
from traffic import Traffic

MIN_MARGIN = 0.001
"""Between the best token and the next, in log-probability: rounding that differs with the batch
must not decide which tokens are right."""
POOL_BYTES = 160_000_000
StartCluster = Callable[..., Awaitable[Cluster]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 KiB of KV a token, 512 KiB a block of 16.

    Attention is sharp and weighs much, so that one wrong block changes the tokens.
    """
    folder = write_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny",
        vocab_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
    )
    write_pair_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "q_proj" in name:
            tensor *= 4
        if "o_proj" in name:
            tensor *= 8
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


class Reference:
    """What one engine that nothing happens to answers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._answers: dict[tuple[tuple[int, ...], int], list[int] | None] = {}
        self._prompts: dict[tuple[int, int], list[list[int]]] = {}
        self._rng = random.Random(0)

    def prompt(self, index: int, num_tokens: int, max_tokens: int) -> list[int]:
        """One of a series of random prompts whose answers rounding cannot change."""
        series = self._prompts.setdefault((num_tokens, max_tokens), [])
        while len(series) <= index:
            prompt = [self._rng.randrange(256) for _ in range(num_tokens)]
            if self._answer(prompt, max_tokens) is not None:
                series.append(prompt)
        return series[index]

    def conversation(
        self, index: int, *, num_turns: int, turn_tokens: int, max_tokens: int
    ) -> list[list[int]]:
        """Prompts of which each goes on from the one before and its answer."""
        rng = random.Random(index)
        prompts: list[list[int]] = []
        history: list[int] = []
        while len(prompts) < num_turns:
            prompt = history + [rng.randrange(256) for _ in range(turn_tokens)]
            answer = self._answer(prompt, max_tokens)
            if answer is not None:
                prompts.append(prompt)
                history = prompt + answer
        return prompts

    def tokens(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        answer = self._answer(prompt, max_tokens)
        assert answer is not None, "not a prompt of ours"
        return answer

    def _answer(self, prompt: Sequence[int], max_tokens: int) -> list[int] | None:
        key = (tuple(prompt), max_tokens)
        if key not in self._answers:
            self._answers[key] = self._generate(key[0], max_tokens)
        return self._answers[key]

    def _generate(self, prompt: tuple[int, ...], max_tokens: int) -> list[int] | None:
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=2
        )
        request_id = RequestId(f"r{len(self._answers)}")
        self._engine.submit(GenerateRequest(request_id, Work.GENERATE, prompt, sampling))
        token_ids: list[int] = []
        margin = MIN_MARGIN
        while self._engine.has_work:
            for delta in self._engine.step().deltas:
                token_ids += delta.token_ids
                for entry in delta.logprobs:
                    (_, best), (_, next_best) = entry.top[:2]
                    margin = min(margin, best - next_best)
        return token_ids if margin >= MIN_MARGIN else None


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    config = EngineConfig(
        model_path=model, dtype="float32", kv_cache_bytes=POOL_BYTES, num_threads=1
    )
    return Reference(build_engine(config, clock=ManualClock()).engine)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-seed", type=int, help="of the faults and requests of the soak")
    parser.addoption("--soak-seconds", type=float, help="how long the soak lasts")


@pytest.fixture
async def start_cluster(model: Path, tmp_path: Path) -> AsyncIterator[StartCluster]:
    """(num_prefill, num_decode, *settings of the workers) -> a cluster that is ready."""
    clusters: list[Cluster] = []

    async def start(
        num_prefill: int = 1,
        num_decode: int = 1,
        *settings: str,
        router: Sequence[str] = (),
        transport: str = "auto",
        tls: TlsFiles | None = None,
    ) -> Cluster:
        common = (
            f"engine.kv_cache_bytes={POOL_BYTES}",
            "engine.block_size=16",
            "engine.max_num_batched_tokens=64",
            f"transfer.transport={transport}",
        )
        cluster = Cluster(model, tmp_path, *common, *settings, tls=tls)
        clusters.append(cluster)
        for role, number in ((Role.PREFILL, num_prefill), (Role.DECODE, num_decode)):
            for _ in range(number):
                cluster.add(role)
        cluster.start_router(*router)
        await cluster.ready()
        return cluster

    yield start
    for cluster in clusters:
        await cluster.stop()


@pytest.fixture
def traffic_to(reference: Reference) -> Callable[..., Traffic]:
    """(cluster, seed=...) -> requests to it."""

    def make(cluster: Cluster, *, seed: int) -> Traffic:
        return Traffic(cluster, reference, seed=seed)

    return make
