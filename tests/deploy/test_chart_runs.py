"""What the chart renders does run: its commands, settings, environment, probes and preStop hooks.

Every Deployment of the CPU profile becomes a process of this machine with an address of its own on
the loopback network, and folders of its own where a pod has volumes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from chart import CHART, SECRET, values_file
from redis_server import RedisServer
from tiny_llama import write_checkpoint, write_pair_tokenizer
from tools.helm import Helm

START_S = 60.0
STOP_S = 20.0
ADDRESSES = {"router": "127.0.0.2", "prefill": "127.0.0.3", "decode": "127.0.0.4"}
MODEL = "tiny"
VALUES: dict[str, Any] = {
    **SECRET,
    "model": {"name": MODEL},
    "config": {
        "router": {"policy": {"local_prefill_max_tokens": 0}},
        "prefill": {"drain_s": 5, "engine": {"dtype": "float32"}},
        "decode": {"drain_s": 5, "engine": {"dtype": "float32"}},
    },
    "router": {"endpointDelaySeconds": 0},
    # The image brings no Redis.
    "redis": {"enabled": False, "externalUrl": "redis://replaced:6379"},
}


@dataclass
class Pod:
    """One container of a Deployment as a process."""

    component: str
    container: dict[str, Any]
    root: Path
    secrets: dict[str, str]
    model: Path
    process: subprocess.Popen[bytes] | None = None
    folders: dict[str, Path] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return ADDRESSES[self.component]

    def write_settings(self, settings: dict[str, str]) -> None:
        self.folders = {
            "/etc/baton": self.root / "etc",
            "/tmp": self.root / "tmp",
            "/cache": self.root / "cache",
            "/models/model": self.model,
        }
        for folder in self.folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        for name, text in settings.items():
            (self.folders["/etc/baton"] / name).write_text(self.here(text))

    def here(self, text: str) -> str:
        """Paths and addresses of the pod as those of this machine."""
        inside = "|".join(map(re.escape, self.folders))
        text = re.sub(
            rf"(?<![\w/])({inside})(?=[/\s]|$)", lambda found: str(self.folders[found[1]]), text
        )
        return text.replace("0.0.0.0", self.address).replace("127.0.0.1", self.address)

    @property
    def environment(self) -> dict[str, str]:
        """Of the container alone, as in a pod."""
        made = {"PATH": os.environ["PATH"]}
        for variable in self.container["env"]:
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                path = source["fieldRef"]["fieldPath"]
                names = {"status.podIP": self.address, "metadata.name": f"{self.component}-x7"}
                value = names[path]
            elif "secretKeyRef" in source:
                value = self.secrets[source["secretKeyRef"]["key"]]
            else:
                value = self.here(variable["value"])
            made[variable["name"]] = value
        return made

    def command(self, words: list[str]) -> list[str]:
        programs = {"python": [sys.executable], "baton": [sys.executable, "-m", "baton.cli.main"]}
        return programs[words[0]] + [self.here(word) for word in words[1:]]

    def start(self) -> None:
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(self.container["command"]),
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def execute(self, words: list[str], timeout_s: float = 30.0) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(words),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def probe(self, kind: str) -> bool:
        """As the kubelet asks."""
        assert self.process is not None
        assert self.process.poll() is None, (self.root / "log").read_text()[-2000:]
        probe = self.container[kind]
        if "exec" in probe:
            return self.execute(probe["exec"]["command"]).returncode == 0
        ports = {port["name"]: port["containerPort"] for port in self.container["ports"]}
        url = f"http://{self.address}:{ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"
        try:
            return httpx.get(url, timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_for(self, kind: str) -> None:
        deadline = time.monotonic() + START_S
        while not self.probe(kind):
            assert time.monotonic() < deadline, (self.root / "log").read_text()[-2000:]
            time.sleep(0.1)

    def end(self) -> int:
        """preStop, then SIGTERM, as the kubelet ends a container. Returns the exit status."""
        assert self.process is not None
        self.hook = self.execute(self.container["lifecycle"]["preStop"]["exec"]["command"])
        self.process.terminate()
        return self.process.wait(STOP_S)

    hook: subprocess.CompletedProcess | None = None


@pytest.fixture(scope="module")
def deployed(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pod]]:
    root = tmp_path_factory.mktemp("deployed")
    model = write_checkpoint(root / "model")
    write_pair_tokenizer(model)
    objects = helm.template(CHART, values_file("values-cpu.yaml"), values=VALUES)
    settings = next(o for o in objects if o["metadata"]["name"].endswith("-settings"))["data"]
    (secret,) = (o["stringData"] for o in objects if o["kind"] == "Secret")
    redis = RedisServer(root)
    redis.start()
    pods: dict[str, Pod] = {}
    try:
        for obj in objects:
            if obj["kind"] == "Deployment":
                (container,) = obj["spec"]["template"]["spec"]["containers"]
                name = container["name"]
                secrets = {**secret, "redis-url": redis.url}
                pods[name] = Pod(name, container, root / name, secrets, model)
                pods[name].write_settings(settings)
        yield pods
    finally:
        for pod in pods.values():
            if pod.process is not None and pod.process.poll() is None:
                pod.process.kill()
                pod.process.wait()
        redis.stop()


def ask(pods: dict[str, Pod]) -> dict[str, Any]:
    answer = httpx.post(
        f"http://{pods['router'].address}:8000/v1/completions",
        json={"model": MODEL, "prompt": list(range(1, 70)), "max_tokens": 8, "temperature": 0},
        timeout=60,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def metric(pods: dict[str, Pod], name: str) -> float:
    url = f"http://{pods['router'].address}:8001/metrics"
    text = httpx.get(url, timeout=5, trust_env=False).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_the_pods_of_a_release_start_serve_and_end(deployed: dict[str, Pod]) -> None:
    pods = deployed
    assert set(pods) == {"router", "prefill", "decode"}
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
    answer = ask(pods)
    assert answer["usage"]["completion_tokens"] >= 1
    # It went through both pools: KV passed between two addresses.
    assert metric(pods, "baton_kv_transfer_bytes_sum") > 0
    for component in ("router", "prefill", "decode"):
        assert pods[component].end() == 0, (pods[component].root / "log").read_text()[-2000:]
        hook = pods[component].hook
        assert hook is not None and hook.returncode == 0, hook
        # No word of what is secret.
        log = (pods[component].root / "log").read_text()
        assert not any(value in log for value in pods[component].secrets.values() if value)
    assert json.loads((pods["router"].root / "log").read_text().splitlines()[0])
