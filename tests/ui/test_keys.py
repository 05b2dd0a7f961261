"""The page where API keys are required."""

from __future__ import annotations

import httpx
import pytest
from playwright.sync_api import expect

from running_system import RunningSystem
from services.router.shared.state import TenantRecord, hash_key
from services.router.tenants.api_keys import new_key, write_keys

pytestmark = pytest.mark.ui


@pytest.fixture(scope="module")
def keys():
    return {name: new_key() for name in ("acme", "other")}


@pytest.fixture(scope="module")
def locked(tmp_path_factory, smollm2_dir, keys):
    folder = tmp_path_factory.mktemp("locked")
    write_keys(folder / "keys.json", {hash_key(k): TenantRecord(n) for n, k in keys.items()})
    running = RunningSystem(
        [
            *("--model", str(smollm2_dir), "--no-ray"),
            *("--set", f"router.tenants.keys_file={folder / 'keys.json'}"),
        ],
        folder,
    )
    running.start()
    yield running
    running.kill()


def test_page_asks_for_a_key_and_shows_that_tenants_requests_alone(page, locked, keys):
    answer = httpx.post(
        f"{locked.url}/v1/completions",
        json={"model": "SmolLM2-135M-Instruct", "prompt": "Hello", "max_tokens": 2},
        headers={"authorization": f"Bearer {keys['other']}"},
        timeout=60,
    )
    assert answer.status_code == 200
    page.goto(f"{locked.url}/ui#requests")
    expect(page.locator("#key-dialog")).to_be_visible()
    page.locator("#key-input").fill(keys["acme"])
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("2 of 2 workers ready")
    expect(page.locator("#request-list")).to_contain_text("No requests yet")
    page.goto(f"{locked.url}/ui#request/{answer.json()['id']}")
    expect(page.locator("#request-detail")).to_contain_text("not among the last ones")
    # The key was for this tab, not for the machine.
    assert page.evaluate("localStorage.getItem('baton-api-key')") is None


def test_wrong_key_is_told(page, locked):
    page.goto(f"{locked.url}/ui")
    page.locator("#key-input").fill("wrong")
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#status")).to_contain_text("an API key is needed")
