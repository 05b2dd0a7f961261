"""A system with TLS at every door, API keys and tenants, as a user starts it: who gets in, how
much they may, whose cache they hit, and that no log tells what is secret."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from baton.cli.certs import tls_config, write_certificates
from baton.core.tls import TlsFiles
from baton.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from running_system import RunningSystem
from tiny_llama import write_checkpoint, write_pair_tokenizer

LIMIT_BYTES = 20_000
PROMPT = list(range(3, 120))


def make_key(file: Path, tenant: str, *limits: str) -> str:
    command = [sys.executable, "-m", "baton.cli.main", "keys", "create", tenant]
    done = subprocess.run(
        [*command, "--file", str(file), *limits], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("security")
    write_certificates(folder / "inside")
    write_certificates(folder / "doors", "localhost")
    write_checkpoint(folder / "tiny", vocab_size=256, max_position_embeddings=2048)
    write_pair_tokenizer(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    file = folder / "keys.json"
    return {
        "acme": make_key(file, "acme"),
        "rival": make_key(file, "rival"),
        "small": make_key(file, "small", "--requests-per-minute", "2"),
    }


@pytest.fixture(scope="module")
def guarded(
    make_system: Callable[..., RunningSystem], folder: Path, keys: dict[str, str]
) -> Iterator[RunningSystem]:
    doors = folder / "doors"
    system = make_system(
        *("--no-ray", "--model", str(folder / "tiny"), "--dtype", "float32"),
        *("--tls-dir", str(folder / "inside")),
        *("--set", f"router.edge.tls.cert_file={doors / 'router.pem'}"),
        *("--set", f"router.edge.tls.key_file={doors / 'router-key.pem'}"),
        *("--set", f"router.edge.max_body_bytes={LIMIT_BYTES}"),
        *("--set", f"router.tenants.keys_file={folder / 'keys.json'}"),
        *("--set", "router.policy.local_prefill_max_tokens=0", "--set", "router.log.level=debug"),
        *("--set", "prefill.log.level=debug", "--set", "decode.log.level=debug"),
    )
    system.tls = TlsFiles(tls_config(folder / "inside", "router"))
    system.start()
    yield system
    system.kill()


class Client:
    """Asks over TLS in the name of a tenant."""

    def __init__(self, system: RunningSystem, ca: Path, key: str) -> None:
        self._http = httpx.Client(
            base_url=f"https://localhost:{system.http_port}",
            verify=ssl.create_default_context(cafile=str(ca)),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=60,
            trust_env=False,
        )

    def ask(self, prompt: list[int] = PROMPT, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 3, "temperature": 0, **fields}
        return self._http.post("/v1/completions", json=body)

    def cached(self, **fields: Any) -> int:
        """Tokens of the prompt that were not computed again."""
        answer = self.ask(**fields)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    def close(self) -> None:
        self._http.close()


@pytest.fixture
def client(guarded: RunningSystem, folder: Path) -> Iterator[Callable[[str], Client]]:
    made: list[Client] = []

    def make(key: str) -> Client:
        made.append(Client(guarded, folder / "doors" / "ca.pem", key))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_nobody_gets_in_without_a_key(
    client: Callable[[str], Client], keys: dict[str, str]
) -> None:
    for key in ("", "baton-" + "x" * 43, keys["acme"][:-1], keys["acme"] + "x"):
        answer = client(key).ask()
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert client(keys["acme"]).ask().status_code == 200


def test_the_grpc_door_asks_for_the_same(
    guarded: RunningSystem, folder: Path, keys: dict[str, str]
) -> None:
    trusted = grpc.ssl_channel_credentials((folder / "doors" / "ca.pem").read_bytes())
    request = inference_pb2.CompletionRequest(
        model="tiny",
        token_ids=inference_pb2.TokenIds(ids=PROMPT),
        sampling=worker_pb2.SamplingParams(max_tokens=3, ignore_eos=True),
    )
    with grpc.secure_channel(f"localhost:{guarded.grpc_port}", trusted) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request, timeout=60))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        key = [("authorization", f"Bearer {keys['acme']}")]
        *_, last = stub.Generate(request, timeout=60, metadata=key)
    assert last.finish_reason


def test_too_much_at_once_is_413_and_too_often_429(
    client: Callable[[str], Client], keys: dict[str, str]
) -> None:
    answer = client(keys["rival"]).ask([7] * LIMIT_BYTES)
    assert answer.status_code == 413 and str(LIMIT_BYTES) in answer.text
    small = client(keys["small"])
    statuses = [small.ask().status_code for _ in range(4)]
    assert statuses == [200, 200, 429, 429]


def test_tenants_hit_their_own_cache_and_nobody_elses(
    client: Callable[[str], Client], keys: dict[str, str]
) -> None:
    acme, rival = client(keys["acme"]), client(keys["rival"])
    prompt = list(range(100, 230))
    assert acme.cached(prompt=prompt) == 0
    assert acme.cached(prompt=prompt) > 64
    # The same prompt, and every way to name the other's salt.
    for salt in (None, "acme", "acme\0", "acme\0acme"):
        assert rival.cached(prompt=prompt, cache_salt=salt) == 0
    assert rival.cached(prompt=prompt) > 64
    # Its own salt parts its own cache.
    assert acme.cached(prompt=prompt, cache_salt="x") == 0
    assert acme.cached(prompt=prompt, cache_salt="x") > 64


def test_no_log_tells_what_is_secret(
    guarded: RunningSystem, folder: Path, keys: dict[str, str], client: Callable[[str], Client]
) -> None:
    answer = client(keys["acme"]).ask(max_tokens=12)
    assert answer.status_code == 200
    logs = guarded.output + "".join(
        file.read_text(errors="replace") for file in sorted(guarded.run_dir.rglob("*.log"))
    )
    assert '"request ended"' in logs
    secrets = dict(keys)
    secrets |= {f"salt of {name}": json.dumps(f"{name}\0")[1:-1] for name in keys}
    secrets["cluster secret"] = (guarded.run_dir / "registry/cluster-secret").read_text().strip()
    for file in folder.rglob("*-key.pem"):
        secrets[file.name] = file.read_text().splitlines()[1]
    secrets["prompt"] = json.dumps(PROMPT[:4])[1:-1]
    secrets["answer"] = answer.json()["choices"][0]["text"]
    found = [name for name, secret in secrets.items() if secret and secret in logs]
    assert found == []
    for name, key in keys.items():
        # Not even of a refused one a part.
        assert key[6:20] not in logs, name


def test_the_plain_text_port_answers_probes_and_nothing_else(guarded: RunningSystem) -> None:
    (file,) = (guarded.run_dir / "targets").glob("*.json")
    (address,) = json.loads(file.read_text())[0]["targets"]
    with httpx.Client(base_url=f"http://{address}", trust_env=False) as plain:
        assert plain.get("/health").status_code == 200
        assert "baton_requests_total" in plain.get("/metrics").text
        assert plain.post("/v1/completions", json={}).status_code == 404
    with httpx.Client(trust_env=False) as plain, pytest.raises(httpx.TransportError):
        plain.get(f"http://127.0.0.1:{guarded.http_port}/health")
    guarded.assert_nothing_leaked()
