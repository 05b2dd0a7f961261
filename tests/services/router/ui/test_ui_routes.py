"""The page over HTTP: its files, its data, and who may see what."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import httpx
import pytest

from baton.core.errors import ConfigError
from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.request import FinishReason, RequestId
from baton.telemetry.metrics import Metrics
from services.router.admission.slo_config import SloConfig
from services.router.edge.http_app import HttpApp
from services.router.pool_stats import PoolStats
from services.router.requests.request_record import RequestRecord
from services.router.shared.process_state import ProcessState
from services.router.shared.state import TenantRecord, hash_key
from services.router.tenants.api_keys import new_key, write_keys
from services.router.tenants.tenants import open_tenants
from services.router.tenants.tenants_config import TenantsConfig
from services.router.ui.ui import Ui
from services.router.ui.ui_config import UiConfig
from services.router.ui.ui_routes import open_ui_routes
from services.router.workers.cluster_view import ClusterView, WorkerState
from worker_tables import load_report, worker_info

PAGE = Path("services/router/ui/page")


class Router:
    """A router with a request that runs and a clock that stands."""

    def __init__(self) -> None:
        self.live: list[RequestRecord] = []
        self.uptime_s = 0.0

    def view(self) -> ClusterView:
        return ClusterView((WorkerState(worker_info("p0"), load_report()),))

    def pool_stats(self) -> PoolStats:
        self.uptime_s += 2
        return PoolStats(self.uptime_s, num_running=len(self.live))

    def running(self) -> list[RequestRecord]:
        return self.live


def record(name: str, tenant: str, at_s: float = 100.0) -> RequestRecord:
    made = RequestRecord(RequestId(name), "m", 10, tenant)
    made.timeline.record(Event.ARRIVED, at_s)
    made.finish_reason = FinishReason.STOP
    return made


class _NoModels:
    """Nothing is generated here."""

    def models(self):
        return ()


@pytest.fixture
def shown():
    return Router()


@pytest.fixture
def ui(shown):
    return Ui(UiConfig(max_requests=10), shown, wall_clock=lambda: 101.0)


@pytest.fixture
def serve(ui):
    @contextlib.asynccontextmanager
    async def serve(config=None, *, is_on=True):
        config = config or TenantsConfig()
        metrics = Metrics()
        tenants = open_tenants(config, SloConfig(), shared=ProcessState(), metrics=metrics)
        routes = open_ui_routes(ui if is_on else None, tenants, config)
        app = HttpApp(_NoModels(), metrics=metrics, tenants=tenants, ui=routes)
        transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
            yield client
        app.close()

    return serve


async def test_page_and_every_file_it_names_are_there(serve):
    async with serve() as client:
        page = await client.get("/ui")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        named = set(re.findall(r'(?:src|href)="ui/([\w.]+)"', page.text))
        scripts = "".join(f.read_text() for f in PAGE.glob("*.js"))
        named |= set(re.findall(r'from "\./([\w.]+)"', scripts))
        assert named == {f.name for f in PAGE.iterdir()} - {"index.html"}
        for name in named:
            answer = await client.get(f"/ui/{name}")
            assert answer.status_code == 200, name
            assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert (await client.head("/ui/")).headers["content-length"] == str(len(page.content))


async def test_page_needs_nothing_from_elsewhere_and_nothing_inline():
    for file in PAGE.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://", text), file
        assert "innerHTML" not in text and "eval(" not in text, file
    assert not re.search(
        r"<script(?![^>]*src=)|\son\w+=|\sstyle=", (PAGE / "index.html").read_text()
    )


@pytest.mark.parametrize(
    "path",
    ["/ui/nothing.js", "/ui/../config.py", "/ui/data", "/ui/data/state/x", "/ui/data/state/-1",
     "/ui/data/state/²", "/ui/page/app.js", "/uix", "/ui/data/requests/none"],
)  # fmt: skip
async def test_other_paths_are_not_found(serve, path):
    async with serve() as client:
        answer = await client.get(path)
    assert answer.status_code == 404 and "error" in answer.json()


async def test_only_reading_is_allowed(serve):
    async with serve() as client:
        answer = await client.post("/ui")
    assert answer.status_code == 405 and answer.headers["allow"] == "GET, HEAD"


async def test_state_has_cluster_requests_and_new_samples(serve, ui, shown):
    shown.live = [record("live", "anonymous")]
    ui.book.ended(record("done", "anonymous"))
    ui.look()
    async with serve() as client:
        state = (await client.get("/ui/data/state/0")).json()
        assert [w["id"] for w in state["topology"]["workers"]] == ["p0"]
        assert [(r["id"], r["is_running"]) for r in state["requests"]] == [
            ("live", True), ("done", False),
        ]  # fmt: skip
        assert (state["num_running"], state["samples"]) == (1, [])
        huge = await client.get("/ui/data/state/" + "9" * 400)
        assert huge.status_code == 200


async def test_a_request_is_found_while_it_runs_and_after(serve, ui, shown):
    shown.live = [record("live", "anonymous")]
    async with serve() as client:
        found = (await client.get("/ui/data/requests/live")).json()
        assert found["request"]["is_running"] and found["request"]["total_ms"] == 1000
        ui.book.ended(shown.live.pop())
        found = (await client.get("/ui/data/requests/live")).json()
        assert found["request"]["state"] == "stop"


async def test_data_needs_a_key_and_shows_a_tenant_its_own_requests(serve, ui, tmp_path):
    keys = {name: new_key() for name in ("acme", "other")}
    path = tmp_path / "keys.json"
    write_keys(path, {hash_key(key): TenantRecord(name) for name, key in keys.items()})
    for name in keys:
        ui.book.ended(record(f"of-{name}", name))
    async with serve(TenantsConfig(keys_file=path)) as client:
        assert (await client.get("/ui")).status_code == 200
        for data in ("state/0", "requests/of-acme"):
            assert (await client.get(f"/ui/data/{data}")).status_code == 401
        mine = {"authorization": f"Bearer {keys['acme']}"}
        state = (await client.get("/ui/data/state/0", headers=mine)).json()
        assert [r["id"] for r in state["requests"]] == ["of-acme"]
        own = await client.get("/ui/data/requests/of-acme", headers=mine)
        others = await client.get("/ui/data/requests/of-other", headers=mine)
        assert (own.status_code, others.status_code) == (200, 404)
        assert own.headers["cache-control"] == "no-store"


async def test_page_can_be_switched_off(serve):
    async with serve(is_on=False) as client:
        assert (await client.get("/ui")).status_code == 404


@pytest.mark.parametrize("values", [{"max_requests": 0}, {"history_s": 10**9}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        UiConfig(**values)
