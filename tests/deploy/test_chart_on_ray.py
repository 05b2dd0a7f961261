"""The serve config and settings that the chart renders for Ray, on a real Ray of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chart import CHART, ROOT, values_file
from running_system import free_port
from tiny_llama import write_checkpoint, write_pair_tokenizer
from tools.helm import Helm

TIMEOUT_S = 180


@pytest.mark.slow
def test_the_serve_application_of_a_release_serves_and_drains(helm: Helm, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    write_pair_tokenizer(model)
    ports = {"httpPort": free_port(), "grpcPort": free_port(), "metricsPort": free_port()}
    pool = {"drain_s": 3, "engine": {"dtype": "float32"}}
    router = {"edge": {"stop_grace_s": 2}, "policy": {"local_prefill_max_tokens": 0}}
    objects = helm.template(
        CHART,
        values_file("values-all-ray.yaml"),
        values={
            "model": {"name": "tiny"},
            "config": {"prefill": pool, "decode": pool, "router": router},
            "pools": {"prefill": {"replicas": 1}, "decode": {"replicas": 1}},
            "router": ports,
        },
    )
    settings = next(o for o in objects if o["metadata"]["name"].endswith("-settings"))["data"]
    folder = tmp_path / "etc"
    folder.mkdir()
    for name, text in settings.items():
        here = text.replace("0.0.0.0", "127.0.0.1").replace("/models/model", str(model))
        (folder / name).write_text(here.replace("/tmp/baton/registry", str(tmp_path / "registry")))
    (service,) = (o for o in objects if o["kind"] == "RayService")
    config = tmp_path / "serve.yaml"
    config.write_text(service["spec"]["serveConfigV2"])
    script = ROOT / "tests/support/ray_release.py"
    arguments = [folder, config, ports["httpPort"], ports["metricsPort"]]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BATON_ADVERTISE_HOST": "127.0.0.1",
            "BATON_TRANSFER__CLUSTER_SECRET": "s" * 32,
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["health"], seen["status"]) == (200, 200)
    moved = [line for line in seen["metrics"].splitlines() if "kv_transfer_bytes_sum{" in line]
    assert sum(float(line.split()[-1]) for line in moved) > 0
    assert (seen["node"], seen["ready"], seen["drained"]) == (0, 0, 0)
    assert seen["ready_then"] == 1
