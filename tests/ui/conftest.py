"""A real browser in front of the real system."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

from running_system import RunningSystem

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE = {"width": 1200, "height": 850}
KEYS = ("acme", "other")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium: the machine's own, or the one that playwright has fetched."""
    own = next((path for name in COMMANDS if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        try:
            # Chromium's sandbox does not start as root, and the page is ours.
            browser = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except Error as error:
            raise RuntimeError(
                "no Chromium here: install the distribution's package `chromium`, or run "
                "`.venv/bin/python -m playwright install chromium`"
            ) from error
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[RunningSystem]:
    running = RunningSystem(
        [
            *("--model", str(smollm2_dir), "--no-ray"),
            *("--set", "router.policy.local_prefill_max_tokens=0"),
            *("--set", "router.pool_stats.ttft_s=30", "--set", "router.pool_stats.itl_s=10"),
        ],
        tmp_path_factory.mktemp("run"),
    )
    running.start()
    yield running
    running.kill()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab of its own. What goes wrong in it fails the test, and so does a way to elsewhere."""
    context = browser.new_context(viewport=WIDE, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(30_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if "Content Security" in m.text else None)
    page.on(
        "request",
        lambda r: None if r.url.startswith("http://127.0.0.1:") else problems.append(r.url),
    )
    yield page
    context.close()
    assert problems == []
