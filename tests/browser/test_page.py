"""The page in a real headless Chromium: ask, watch the answer grow, change a slider, compare, press a thumb.

$ERNIE_CHROMIUM names another browser; $ERNIE_SCREENSHOTS a folder for pictures of it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from ernie_dist.data.documents import Turn

pytest.importorskip("gradio")

pytestmark = pytest.mark.browser

GROWTH = """
(() => {
    window.lengths = [];
    const answer = () => (document.querySelector('#side-1 [data-testid="bot"]') || {innerText: ''}).innerText.length;
    new MutationObserver(() => window.lengths.push(answer()))
        .observe(document.body, {childList: true, subtree: true, characterData: true});
})()
"""
"""notes how long the answer of the second model is whenever the page changes"""


SETTLED = """
() => {
    const shown = [...document.querySelectorAll('[data-testid="bot"]')].map(each => each.innerText).join('|');
    if (window.shown !== shown) [window.shown, window.since] = [shown, Date.now()];
    return shown && Date.now() - window.since > 2000;
}
"""
"""until it is, another question is not taken"""


@dataclass
class Served:
    """A page of two models, and what it keeps."""

    address: str
    feedback: Path


@pytest.fixture(scope="module")
def served(taught: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    feedback = tmp_path_factory.mktemp("page") / "feedback.jsonl"
    command = [sys.executable, "-m", "launcher", "serve", str(taught.tuned), "--against", str(taught.base)]
    options = ["--feedback", str(feedback), "--port", "0", "--device", "cpu", "--max-new-tokens", "100"]
    environment = {**os.environ, "ERNIE_AUTH": "li:sesame"}
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, env=environment, text=True) as server:
        try:
            yield Served(server.stdout.readline().split()[0], feedback)
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def page(served: Served, chromium: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(
            http_credentials={"username": "li", "password": "sesame"}, viewport={"width": 1280, "height": 900}
        )
        page = context.new_page()
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        yield page
        browser.close()


def ask(page: Page, text: str) -> None:
    page.locator("#question textarea, #question input").fill(text)
    page.keyboard.press("Enter")


def begin_anew(page: Page) -> None:
    """A question that is asked before the page is empty would be ended with the others."""
    page.click("#clear")
    expect(page.locator("[data-testid=user], [data-testid=bot]")).to_have_count(0)


def answers(page: Page, side: int) -> Locator:
    return page.locator(f"#side-{side} [data-testid=bot]")


def test_ask_compare_and_teach(page: Page, served: Served, taught: Any, read_back: Any, tmp_path: Path) -> None:
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(served.address)
    page.wait_for_selector("#question")
    page.evaluate(GROWTH)
    ask(page, "讲个故事")
    expect(answers(page, 1)).to_have_text(taught.answers["讲个故事"])
    grown = page.evaluate("window.lengths")
    assert grown == sorted(grown) and len(set(grown)) > 10, "the answer comes piece by piece"
    expect(answers(page, 0)).not_to_have_text(taught.answers["讲个故事"])
    other = answers(page, 0).inner_text()
    page.wait_for_function(SETTLED)  # until its end has come, an answer cannot be liked

    page.locator("#side-1 button[aria-label=Like]").click()
    expect(page.get_by_text("kept in")).to_be_visible()
    page.locator("#side-0 button[aria-label=Dislike]").click()
    expect(page.get_by_text("feedback.down.jsonl")).to_be_visible()
    liked = [("user", "讲个故事", False), ("assistant", taught.answers["讲个故事"], True)]
    assert read_back(served.feedback) == [liked]
    down = read_back(served.feedback.with_name("feedback.down.jsonl"))
    assert [turn[0] for turn in down[0]] == ["user", "assistant"] and down[0][1][1][:9] == other[:9]
    (pair,) = read_back(served.feedback.with_name("feedback.preferences.jsonl"), preference="pairs")
    assert [tuple(turn) for turn in pair.chosen] == liked and pair.rejected == tuple(map(Turn._make, down[0]))
    pictures = Path(os.environ.get("ERNIE_SCREENSHOTS", tmp_path))
    assert page.screenshot(path=pictures / "page.png")
    assert hosts == {urlsplit(served.address).netloc}, "the page asks nobody else for anything"


def test_sliders_stop_and_new_chat(page: Page, served: Served, taught: Any) -> None:
    page.goto(served.address)
    length = page.get_by_label("number input for max_new_tokens")
    length.fill("5")
    length.press("Tab")
    ask(page, "金苓产于哪里？")
    expect(answers(page, 1)).to_have_count(1)
    page.wait_for_function(SETTLED)
    short = answers(page, 1).inner_text()
    assert len(short) < len(taught.answers["金苓产于哪里？"]) and taught.answers["金苓产于哪里？"].startswith(short)

    begin_anew(page)
    page.get_by_label("range slider for max_new_tokens").press("End")
    ask(page, "讲个故事")
    expect(answers(page, 1)).to_have_text(taught.answers["讲个故事"])
    page.wait_for_function(SETTLED)

    ask(page, "青芷")
    expect(page.locator("#side-0 [data-testid=user]")).to_have_count(2)
    page.click("#stop")
    begin_anew(page)
    ask(page, "白芝产于哪里？")
    expect(answers(page, 1)).to_have_text(taught.answers["白芝产于哪里？"])
    page.wait_for_function(SETTLED)
    ask(page, "a</s>b")
    expect(page.get_by_text("holds the control token </s> as text").first).to_be_visible()
    expect(answers(page, 1)).to_have_count(1)
