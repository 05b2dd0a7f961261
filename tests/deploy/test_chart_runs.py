"""What the chart renders does run: its commands, settings, environment, probes and preStop hooks.

Every Deployment of the CPU profile becomes processes of this machine; then the release is updated
to another revision of the model under load, pod by pod, as Kubernetes does it.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.core.config import merge
from chart import CHART, SECRET, values_file
from pods import Pod, make_pods
from redis_server import RedisServer
from rolling import Clients, Prompt, Stream, read_stream, revisions_of
from tiny_llama import write_checkpoint, write_pair_tokenizer
from tools.helm import Helm

MODEL = "tiny"
VALUES: dict[str, Any] = {
    **SECRET,
    "model": {"name": MODEL},
    "config": {
        "router": {"policy": {"local_prefill_max_tokens": 0}, "edge": {"stop_grace_s": 40}},
        "prefill": {"drain_s": 40, "engine": {"dtype": "float32", "num_threads": 1}},
        "decode": {"drain_s": 40, "engine": {"dtype": "float32", "num_threads": 1}},
    },
    "router": {"endpointDelaySeconds": 1},
    # The image brings no Redis.
    "redis": {"enabled": False, "externalUrl": "redis://replaced:6379"},
}
COMPONENTS = ("router", "prefill", "decode")
STREAM_TOKENS = 40
LONG_TOKENS = 200
SETTLE_S = 20.0


@dataclass
class Release:
    """Pods of one or two revisions, and the endpoints of the Service before the routers."""

    helm: Helm
    root: Path
    redis: RedisServer
    models: dict[str, Path]
    """By revision."""
    pods: dict[str, list[Pod]] = field(default_factory=dict)
    """By revision."""
    endpoints: list[str] = field(default_factory=list)
    network: str = "127.0.1"
    num_addresses: int = 0

    def add(self, revision: str, num_each: int) -> list[Pod]:
        """Pods of a revision: its chart rendered with a model folder of its own. Not started."""
        values = merge(VALUES, {"model": {"path": revision}})
        objects = self.helm.template(CHART, values_file("values-cpu.yaml"), values=values)
        addresses = {each: [self._address() for _ in range(num_each)] for each in COMPONENTS}
        self.pods[revision] = make_pods(
            objects,
            self.root,
            addresses=addresses,
            redis_url=self.redis.url,
            volumes={f"/models/{revision}": self.models[revision]},
            suffix=f"-{revision}",
        )
        return self.pods[revision]

    def of(self, revision: str, component: str) -> list[Pod]:
        return [pod for pod in self.pods[revision] if pod.component == component]

    def bring_up(self, pod: Pod) -> None:
        """Returns when it is ready, and an endpoint if it is a router."""
        if pod.process is None:
            pod.start()
        pod.wait_for("readinessProbe")
        if pod.component == "router":
            self.endpoints.append(pod.url("http"))

    def take_down(self, pod: Pod) -> None:
        """As Kubernetes: no endpoint any more, and at the same time preStop begins."""
        if pod.component == "router":
            self.endpoints.remove(pod.url("http"))
        assert pod.end() == 0, pod.log[-2000:]
        assert pod.hook is not None and pod.hook.returncode == 0, pod.hook

    def close(self) -> None:
        for pod in self.all_pods():
            pod.kill()
        self.redis.stop()

    def all_pods(self) -> list[Pod]:
        return [pod for pods in self.pods.values() for pod in pods]

    def _address(self) -> str:
        self.num_addresses += 1
        return f"{self.network}.{self.num_addresses}"


@pytest.fixture(scope="module")
def make_release(
    helm: Helm, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Release]]:
    made: list[Release] = []

    def make() -> Release:
        root = tmp_path_factory.mktemp("release")
        models = {}
        for seed, revision in enumerate(("first", "second")):
            models[revision] = write_checkpoint(root / revision, seed=seed, vocab_size=256)
            write_pair_tokenizer(models[revision])
        redis = RedisServer(root)
        redis.start()
        network = f"127.0.{len(made) + 1}"
        made.append(Release(helm, root, redis, models, network=network))
        return made[-1]

    yield make
    for release in made:
        release.close()


@pytest.fixture(scope="module")
def release(make_release: Callable[[], Release]) -> Release:
    """One pod of each component, of the first revision; not started."""
    made = make_release()
    made.add("first", 1)
    return made


def prompts(number: int) -> list[Prompt]:
    rng = random.Random(number)
    return [tuple(rng.randrange(3, 250) for _ in range(30 + 17 * i)) for i in range(number)]


def answers(url: str, asked: list[Prompt], max_tokens: int) -> dict[Prompt, str]:
    """What the revision that runs alone says to each prompt."""
    found = {}
    for prompt in asked:
        stream = read_stream(url, MODEL, prompt, max_tokens)
        assert not stream.failure, stream
        found[prompt] = stream.text
    return found


def metric(router: Pod, name: str) -> float:
    text = httpx.get(f"{router.url('metrics')}/metrics", timeout=5, trust_env=False).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def placed_pairs(routers: list[Pod]) -> list[tuple[str, str]]:
    """Prefill and decode worker of every placement that has both, as the routers log them."""
    pairs = []
    for router in routers:
        for line in router.log.splitlines():
            for placement in json.loads(line).get("placements", ()):
                if placement["prefill"] and placement["decode"]:
                    pairs.append((placement["prefill"], placement["decode"]))
    return pairs


def revision_of(worker: str) -> str:
    return next(name for name in ("first", "second") if f"-{name}-" in worker)


def test_the_pods_of_a_release_start_and_serve(release: Release) -> None:
    pods = {pod.component: pod for pod in release.pods["first"]}
    assert set(pods) == set(COMPONENTS)
    pods["router"].start()
    pods["router"].wait_for("startupProbe")
    # Alive without workers, and not ready.
    assert pods["router"].probe("livenessProbe")
    assert not pods["router"].probe("readinessProbe")
    for pool in ("prefill", "decode"):
        pods[pool].start()
        assert not pods[pool].probe("readinessProbe")
    for pool in ("prefill", "decode"):
        pods[pool].wait_for("startupProbe")
        pods[pool].wait_for("readinessProbe")
        assert pods[pool].probe("livenessProbe")
    pods["router"].wait_for("readinessProbe")
    release.endpoints.append(pods["router"].url("http"))
    (prompt,) = prompts(1)
    assert answers(release.endpoints[0], [prompt], 8)[prompt]
    # It went through both pools: KV passed between two addresses.
    assert metric(pods["router"], "baton_kv_transfer_bytes_sum") > 0


def test_a_rolling_update_fails_no_request_and_mixes_no_revisions(release: Release) -> None:
    roll(release, num_each=1, num_clients=3, at_once=True)
    for pod in release.pods["first"]:
        # No word of what is secret.
        assert not any(value in pod.log for value in pod.secrets.values() if value)
    assert json.loads(release.pods["first"][0].log.splitlines()[0])


@pytest.mark.slow
def test_a_release_of_several_pods_each_is_updated_pod_by_pod(
    make_release: Callable[[], Release],
) -> None:
    release = make_release()
    for pod in release.add("first", 2):
        release.bring_up(pod) if pod.component != "router" else pod.start()
    for router in release.of("first", "router"):
        router.wait_for("readinessProbe")
        release.endpoints.append(router.url("http"))
    roll(release, num_each=2, num_clients=6, at_once=False)


def roll(release: Release, *, num_each: int, num_clients: int, at_once: bool) -> None:
    """Update from the first revision, which serves, to the second one under load. `at_once`: new
    pods of all components start together, as those of several Deployments do."""
    asked = prompts(6)
    long = prompts(7)[-1]
    first = {
        **answers(release.endpoints[0], asked, STREAM_TOKENS),
        **answers(release.endpoints[0], [long], LONG_TOKENS),
    }
    clients = Clients(release.endpoints, MODEL, asked, num_clients, STREAM_TOKENS)
    clients.start()
    long_streams: list[Stream] = []

    def read_long() -> None:
        url = release.endpoints[0]
        long_streams.append(read_stream(url, MODEL, long, LONG_TOKENS))

    try:
        new_pods = release.add("second", num_each)
        if at_once:
            for pod in new_pods:
                pod.start()
        # Prefill first: for a while one revision has prefill and the other decode workers.
        for component in ("prefill", "decode", "router"):
            pairs = zip(
                release.of("first", component), release.of("second", component), strict=True
            )
            for old, new in pairs:
                release.bring_up(new)
                # It runs while its worker or its router is told to end.
                reader = threading.Thread(target=read_long, daemon=True)
                reader.start()
                release.take_down(old)
                reader.join(60)
        seen = len(clients.streams)
        deadline = time.monotonic() + SETTLE_S
        while len(clients.streams) < seen + 3 * num_clients and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        clients.stop()
    second = {
        **answers(release.endpoints[0], asked, STREAM_TOKENS),
        **answers(release.endpoints[0], [long], LONG_TOKENS),
    }
    assert all(second[prompt] != first[prompt] for prompt in second)
    expected = {"first": first, "second": second}
    whose = revisions_of(clients.streams, expected)
    assert whose[0] == "first" and whose[-1] == "second" and len(whose) >= 6 * num_clients
    assert len(revisions_of(long_streams, expected)) == 3 * num_each
    pairs = placed_pairs([*release.of("first", "router"), *release.of("second", "router")])
    assert {(revision_of(one), revision_of(other)) for one, other in pairs} == {
        ("first", "first"),
        ("second", "second"),
    }
