"""The page as a person uses it: write, read along, look where the time went."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from running_system import RunningSystem

pytestmark = pytest.mark.ui

LONG = "Write a long story about a river. Use many words."
PAGES = ("chat", "cluster", "requests")


def open_page(page: Page, system: RunningSystem, name: str = "chat") -> None:
    page.goto(f"{system.url}/ui#{name}")
    expect(page.locator("#status")).to_have_text("2 of 2 workers ready")


def send(page: Page, text: str, max_tokens: int = 12) -> None:
    """By keyboard alone."""
    page.locator("#chat-max-tokens").evaluate(f"node => node.value = {max_tokens}")
    page.locator("#chat-input").focus()
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def test_tokens_stream_and_the_time_line_opens(page, system):
    open_page(page, system)
    send(page, LONG, max_tokens=60)
    answer = page.locator(".message.assistant .text")
    expect(answer).not_to_be_empty()
    early = answer.inner_text()
    page.locator(".time-line").wait_for()
    assert len(answer.inner_text()) > len(early), "the answer came in one piece"
    expect(page.locator(".foot").last).to_contain_text("60 tokens")

    page.locator(".time-line").click()
    expect(page.locator("#waterfall")).to_be_visible()
    page.get_by_text("As a table", exact=True).click()
    rows = [r.inner_text().split("\t")[:2] for r in page.locator("#request-detail tbody tr").all()]
    assert sorted(rows) == [
        ["decode", "decode-0"],
        ["kv transfer", "decode-0"],
        ["prefill", "prefill-0"],
        ["prefill queue", "prefill-0"],
        ["queue in router", "router"],
    ]


def test_conversation_goes_on_and_can_be_stopped(page, system):
    open_page(page, system)
    with page.expect_request("**/v1/chat/completions"):
        send(page, "Hello")
    page.locator(".time-line").nth(0).wait_for()
    with page.expect_request("**/v1/chat/completions") as second:
        send(page, LONG, max_tokens=2000)
    roles = [m["role"] for m in second.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "user"]
    expect(page.locator(".message.assistant .text").nth(1)).not_to_be_empty()
    page.locator("#chat-stop").click()
    expect(page.locator(".foot").last).to_contain_text("Stopped")
    expect(page.locator("#chat-send")).to_be_enabled()
    system.assert_nothing_leaked()


def test_refused_question_says_why_and_is_kept(page, system):
    open_page(page, system)
    send(page, "Hello", max_tokens=99_999)
    expect(page.locator(".message.error .foot")).to_contain_text("max_tokens")
    expect(page.locator("#chat-input")).to_have_value("Hello")


def test_what_a_model_writes_is_shown_as_text(page, system):
    open_page(page, system)
    send(page, "<img src=x onerror=alert(1)><b>bold</b>")
    expect(page.locator(".message.user .text")).to_have_text(
        "<img src=x onerror=alert(1)><b>bold</b>"
    )
    assert page.locator(".message img, .message b").count() == 0


def test_cluster_shows_workers_transfers_and_charts(page, system):
    open_page(page, system)
    send(page, "Tell me of the sea, the wind and the birds.")
    page.locator(".time-line").wait_for()
    page.get_by_role("link", name="Cluster").click()
    expect(page.locator("#topology .node")).to_have_count(2)
    edge = page.locator("#topology .edge title")
    expect(edge).to_have_text(re.compile(r"prefill-0 to decode-0: \d+ transfers, .*B"))
    expect(page.locator("#charts figure")).to_have_count(8)
    expect(page.locator("#charts")).to_contain_text("TTFT: 100 %")
    expect(page.locator("#charts")).to_contain_text(re.compile(r"kept all targets.*/s"))
    page.get_by_text("Workers as a table").click()
    expect(page.locator("#workers tbody tr")).to_have_count(2)


def test_lost_worker_is_told(page, system, browser):
    # The page's own data, with one worker marked as lost on its way to the browser.
    def lose(route):
        state = route.fetch().json()
        state["topology"]["workers"][0]["state"] = "lost"
        route.fulfill(json=state)

    page.route("**/ui/data/state/*", lose)
    page.goto(f"{system.url}/ui#cluster")
    expect(page.locator("#status")).to_have_text("1 of 2 workers ready")
    expect(page.locator("#status")).to_have_attribute("data-state", "bad")


def test_router_that_does_not_answer_is_told_and_recovers(page, system):
    open_page(page, system)
    page.route("**/ui/data/state/*", lambda route: route.abort())
    expect(page.locator("#status")).to_contain_text("no answer from the router")
    page.unroute("**/ui/data/state/*")
    expect(page.locator("#status")).to_have_text("2 of 2 workers ready")


def test_requests_are_walked_by_keyboard(page, system):
    open_page(page, system)
    send(page, "Hello")
    page.locator(".time-line").wait_for()
    page.get_by_role("link", name="Requests").click()
    first = page.locator("#request-list a").first
    first.focus()
    name = first.get_attribute("data-request")
    # The list has been drawn anew meanwhile, and the focus stays.
    page.wait_for_timeout(2500)
    assert page.evaluate("document.activeElement.dataset.request") == name
    page.keyboard.press("Enter")
    expect(page.locator("#request-title")).to_contain_text(name)


def test_request_that_is_not_known_is_said_so(page, system):
    page.goto(f"{system.url}/ui#request/nobody")
    expect(page.locator("#request-detail")).to_contain_text("not among the last ones")


def test_theme_is_remembered(page, system):
    open_page(page, system)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", [*PAGES, "request"])
def test_page_is_accessible(page, system, name, scheme):
    page.emulate_media(color_scheme=scheme)
    open_page(page, system)
    send(page, "Hello")
    page.locator(".time-line").wait_for()
    if name == "request":
        page.locator(".time-line").click()
        page.locator("#waterfall").wait_for()
    else:
        page.locator(f'nav a[href="#{name}"]').click()
        page.wait_for_timeout(1500)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_page_fits_a_telephone(page, system):
    page.set_viewport_size({"width": 380, "height": 760})
    open_page(page, system, "cluster")
    page.locator("#charts figure").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
