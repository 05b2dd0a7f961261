"""Pods of a rendered chart as processes of this machine: their commands, settings, environment,
probes and preStop hooks are those that the chart renders.

Each has an address of its own on the loopback network, and folders of its own where a pod has
volumes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from chart import Objects

START_S = 120.0
STOP_S = 60.0


@dataclass
class Pod:
    """One container of a Deployment as a process."""

    name: str
    address: str
    container: dict[str, Any]
    root: Path
    secrets: dict[str, str]
    volumes: dict[str, Path]
    """Folders that lie below /models or where a secret is mounted, by their path in the pod."""
    process: subprocess.Popen[bytes] | None = None
    folders: dict[str, Path] = field(default_factory=dict)
    hook: subprocess.CompletedProcess[str] | None = None
    """preStop, once it has run."""

    @property
    def component(self) -> str:
        return str(self.container["name"])

    @property
    def log(self) -> str:
        return (self.root / "log").read_text()

    def write_settings(self, settings: dict[str, str]) -> None:
        self.folders = {
            "/etc/baton": self.root / "etc",
            "/tmp": self.root / "tmp",
            "/cache": self.root / "cache",
            **self.volumes,
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
                names = {"status.podIP": self.address, "metadata.name": f"{self.name}-x7"}
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

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def execute(self, words: list[str], timeout_s: float = 90.0) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(words),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def url(self, port: str) -> str:
        ports = {each["name"]: each["containerPort"] for each in self.container["ports"]}
        return f"http://{self.address}:{ports[port]}"

    def probe(self, kind: str) -> bool:
        """As the kubelet asks."""
        assert self.is_alive, self.log[-2000:]
        probe = self.container[kind]
        if "exec" in probe:
            return self.execute(probe["exec"]["command"]).returncode == 0
        url = self.url(probe["httpGet"]["port"]) + probe["httpGet"]["path"]
        try:
            return httpx.get(url, timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_for(self, kind: str) -> None:
        deadline = time.monotonic() + START_S
        while not self.probe(kind):
            assert time.monotonic() < deadline, self.log[-2000:]
            time.sleep(0.1)

    def end(self) -> int:
        """preStop, then SIGTERM, as the kubelet ends a container. Returns the exit status."""
        assert self.process is not None
        self.hook = self.execute(self.container["lifecycle"]["preStop"]["exec"]["command"])
        self.process.terminate()
        return self.process.wait(STOP_S)

    def kill(self) -> None:
        if self.process is not None and self.is_alive:
            self.process.kill()
            self.process.wait()


def make_pods(
    objects: Objects,
    root: Path,
    *,
    addresses: dict[str, list[str]],
    redis_url: str,
    volumes: dict[str, Path],
    suffix: str = "",
) -> list[Pod]:
    """A pod for each of the `addresses` of a component, not started. `redis_url` replaces that of
    the chart; `suffix` is added to their names."""
    settings = next(o for o in objects if o["metadata"]["name"].endswith("-settings"))["data"]
    (secret,) = (o["stringData"] for o in objects if o["kind"] == "Secret")
    pods = []
    for obj in objects:
        if obj["kind"] != "Deployment":
            continue
        (container,) = obj["spec"]["template"]["spec"]["containers"]
        for number, address in enumerate(addresses.get(container["name"], ())):
            name = f"{container['name']}{suffix}-{number}"
            secrets = {**secret, "redis-url": redis_url}
            pods.append(Pod(name, address, container, root / name, secrets, volumes))
            pods[-1].write_settings(settings)
    return pods
