"""Pictures of the page at /ui for the docs, of a running system under a little load.

Takes the URL of a router, as `baton serve` prints it.
"""

from __future__ import annotations

import argparse
import shutil
import threading
from pathlib import Path

import httpx
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "ui"
SIZE = {"width": 1200, "height": 780}
QUESTION = "Which city is the capital of France?"
LOAD = "Write a story about a river, a bridge and a long road. " * 12
NUM_LOAD = 40
TIMEOUT_MS = 60_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of a router, as `baton serve` prints it")
    url: str = parser.parse_args().url.rstrip("/")
    load = [threading.Thread(target=_ask, args=(url, i)) for i in range(3)]
    for thread in load:
        thread.start()
    own = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.set_default_timeout(TIMEOUT_MS)
        _take(page, url)
        browser.close()
    for thread in load:
        thread.join()


def _take(page: Page, url: str) -> None:
    page.goto(f"{url}/ui")
    page.locator("#chat-model option").first.wait_for(state="attached")
    page.locator("#chat-input").fill(QUESTION)
    page.keyboard.press("Enter")
    page.locator(".time-line").wait_for()
    page.screenshot(path=FOLDER / "chat.png")
    page.locator(".time-line").click()
    page.locator("#waterfall").wait_for()
    page.screenshot(path=FOLDER / "time-line.png")
    page.get_by_role("link", name="Cluster").click()
    page.wait_for_timeout(30_000)
    page.screenshot(path=FOLDER / "cluster.png", full_page=True)


def _ask(url: str, number: int) -> None:
    """A client that asks one thing after the other."""
    with httpx.Client(timeout=60, trust_env=False) as client:
        model = client.get(f"{url}/v1/models").json()["data"][0]["id"]
        for i in range(NUM_LOAD):
            prompt = f"{number}.{i} {LOAD}"
            body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0}
            client.post(f"{url}/v1/completions", json=body).raise_for_status()


if __name__ == "__main__":
    main()
