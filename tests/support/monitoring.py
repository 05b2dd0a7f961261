"""A real Prometheus and a real Alertmanager on loopback, with a webhook at the end.

Their settings are those of deploy/monitoring, with ports of this test and shorter pauses.
"""

from __future__ import annotations

import json
import math
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from chart import ROOT
from monitoring_tools import MonitoringTools
from rule_files import RULES
from running_system import free_port

SETTINGS = ROOT / "deploy/monitoring"
READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
SCRAPE_S = 1


@dataclass
class Webhook:
    """Keeps what Alertmanager sends, by path."""

    notifications: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        notifications = self.notifications

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                notifications.append((self.path, body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nobody reads it."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(STOP_TIMEOUT_S)


class Monitoring:
    """Both servers and the webhook; not started until `start`."""

    def __init__(
        self,
        tools: MonitoringTools,
        directory: Path,
        *,
        targets: Sequence[str],
        pauses: Mapping[str, str],
    ) -> None:
        """`targets`: host and port, all scraped. `pauses`: alert -> its `for` in this test."""
        self._tools = tools
        self._directory = directory
        self._pauses = pauses
        self._targets = [*targets]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port, self._alert_port = free_port(), free_port()
        self.webhook = Webhook()

    @property
    def url(self) -> str:
        """Of Prometheus."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Returns when both are ready."""
        self._write_settings()
        folder = self._directory
        self._launch(
            [
                *self._tools.alertmanager,
                f"--config.file={folder}/alertmanager.yml",
                f"--storage.path={folder}/alertmanager",
                f"--web.listen-address=127.0.0.1:{self._alert_port}",
                # Empty: no cluster, and no port for one.
                "--cluster.listen-address=",
            ],
            "alertmanager",
        )
        self._launch(
            [
                str(self._tools.prometheus),
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/tsdb",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            "prometheus",
        )
        self.until(lambda: all(map(self._is_ready, (self._port, self._alert_port))))

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)
        self._processes.clear()
        self.webhook.stop()

    def until(self, condition: Callable[[], object], timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait for it; the servers' logs say more when it does not come."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = [process.args for process in self._processes if process.poll() is not None]
            assert not ended and time.monotonic() < deadline, f"{ended}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        files = sorted(self._directory.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in files)

    def ask(self, path: str, **parameters: str | float) -> Any:
        """`data` of an answer of Prometheus' API."""
        answer = httpx.get(
            f"{self.url}/api/v1/{path}", params=parameters, timeout=10, trust_env=False
        ).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def now(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of every series that is a number now."""
        result = self.ask("query", query=expr)["result"]
        found = [(series["metric"], float(series["value"][1])) for series in result]
        return [(labels, value) for labels, value in found if math.isfinite(value)]

    def number(self, expr: str) -> float:
        """Of an expression with one series."""
        ((_, value),) = self.now(expr)
        return value

    def history(self, expr: str, *, range_s: int) -> list[list[tuple[float, float]]]:
        """(time, value) of each series over the last `range_s`, numbers alone."""
        end_s = time.time()
        result = self.ask(
            "query_range", query=expr, start=end_s - range_s, end=end_s, step=SCRAPE_S
        )["result"]
        found = [[(float(at), float(value)) for at, value in each["values"]] for each in result]
        numbers = [[point for point in each if math.isfinite(point[1])] for each in found]
        return [each for each in numbers if each]

    def _write_settings(self) -> None:
        folder = self._directory
        (folder / "rules").mkdir()
        for file in RULES.glob("*.yaml"):
            rules = yaml.safe_load(file.read_text())
            for rule in (rule for group in rules["groups"] for rule in group["rules"]):
                if rule.get("alert") in self._pauses:
                    rule["for"] = self._pauses[rule["alert"]]
            (folder / "rules" / file.name).write_text(yaml.safe_dump(rules))
        prometheus = yaml.safe_load((SETTINGS / "prometheus.yml").read_text())
        pause = f"{SCRAPE_S}s"
        prometheus["global"] = {"scrape_interval": pause, "evaluation_interval": pause}
        prometheus["rule_files"] = [f"{folder}/rules/*.yaml"]
        (manager,) = prometheus["alerting"]["alertmanagers"]
        manager["static_configs"] = [{"targets": [f"127.0.0.1:{self._alert_port}"]}]
        (scrape,) = prometheus["scrape_configs"]
        scrape["static_configs"] = [{"targets": self._targets}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(prometheus))
        manager = yaml.safe_load((SETTINGS / "alertmanager.yml").read_text())
        for route in (manager["route"], *manager["route"]["routes"]):
            route |= {"group_wait": "100ms", "group_interval": "1s"}
        for receiver in manager["receivers"]:
            for hook in receiver.get("webhook_configs", ()):
                hook["url"] = f"{self.webhook.url}/{receiver['name']}"
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(manager))

    def _launch(self, command: list[str], name: str) -> None:
        with (self._directory / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _is_ready(self, port: int) -> bool:
        try:
            url = f"http://127.0.0.1:{port}/-/ready"
            return httpx.get(url, timeout=2, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False
