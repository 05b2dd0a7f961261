"""Run the Ray Serve application of a rendered chart on a local Ray; prints what came of it as JSON.

python ray_release.py SETTINGS_DIR SERVE_CONFIG HTTP_PORT METRICS_PORT
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

START_S = 60.0


def main() -> None:
    settings, config_file, http_port, metrics_port = sys.argv[1:]
    config = yaml.safe_load(Path(config_file).read_text())
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    from services.launch.serve_app import build_app

    ServeDeploySchema(**config)
    (application,) = config["applications"]
    args = application["args"] | {"settings_dir": settings, "log_dir": f"{settings}/logs"}
    ray.init(
        include_dashboard=False,
        object_store_memory=80 << 20,
        num_cpus=2,
        resources={"baton_router": 1, "baton_prefill": 1, "baton_decode": 1},
        log_to_driver=False,
    )
    seen: dict[str, Any] = {}
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": int(http_port)})
        serve.run(build_app(args), name=application["name"], route_prefix="/")
        metrics_url = f"http://127.0.0.1:{metrics_port}"
        seen["health"] = _wait_until_ready(metrics_url)
        answer = httpx.post(
            f"http://127.0.0.1:{http_port}/v1/completions",
            json={"model": "tiny", "prompt": list(range(1, 70)), "max_tokens": 8},
            timeout=60,
            trust_env=False,
        )
        seen["status"] = answer.status_code
        seen["metrics"] = httpx.get(f"{metrics_url}/metrics", timeout=5, trust_env=False).text
        config_option = ("--config", f"{settings}/decode.yaml")
        seen["node"] = _baton("probe", "ray", "live")
        seen["ready"] = _baton("probe", "worker", "ready", *config_option, "--count", "2")
        seen["drained"] = _baton("drain", *config_option)
        seen["ready_then"] = _baton("probe", "worker", "ready", *config_option, "--count", "2")
    finally:
        serve.delete(application["name"])
        ray.shutdown()
    print(json.dumps(seen))


def _wait_until_ready(url: str) -> int:
    deadline = time.monotonic() + START_S
    while True:
        try:
            status = httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code
        except httpx.HTTPError:
            status = 0
        if status == 200 or time.monotonic() > deadline:
            return status
        time.sleep(0.2)


def _baton(*arguments: str) -> int:
    command = [sys.executable, "-m", "baton.cli.main", *arguments]
    return subprocess.run(command, stdout=sys.stderr, timeout=60).returncode


if __name__ == "__main__":
    main()
