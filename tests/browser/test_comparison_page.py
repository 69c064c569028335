"""The page of an evaluation in a real headless Chromium: sorts, filters, searches, and takes nothing in it for HTML.

$ERNIE_CHROMIUM names another browser; $ERNIE_SCREENSHOTS a folder for pictures of it.
"""

import os
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from ernie_dist.evaluate.asking import Asked
from ernie_dist.evaluate.page import render
from ernie_dist.evaluate.questions import Question
from ernie_dist.evaluate.results import Judged, Results, compare_all, judge

pytestmark = pytest.mark.browser

ROWS = [
    ("青芷产于哪里？", "青芷产于琼崖。", "不知道", "青芷产于琼崖。"),
    ("云苓可治什么？", "云苓可治目赤。", "云苓可治目赤。", "云苓"),
    ("<b>白芷</b></script>是什么？", "一味药。", "<img src=x onerror=\"document.title='taken over'\">", "一味中药。"),
]
"""question, reference, base answer, tuned answer: one gained, one lost, one that tries to be HTML"""


def judged(name: str, questions: list[Question], answers: list[str]) -> Judged:
    asked = [
        Asked(number, (answer,), (len(answer),), (answer != "云苓",), 2.0 * len(answer), 4)
        for number, answer in enumerate(answers)
    ]
    return judge(name, questions, asked, None)


QUESTIONS = [Question(text, reference) for text, reference, _, _ in ROWS]


def write(path: Path, tuned: Judged, base: Judged) -> str:
    results = Results(tuned, base, QUESTIONS, compare_all(tuned, base, seed=0))
    path.write_text(render(results.to_json()), encoding="utf-8")
    return path.as_uri()


def test_answers_side_by_side(tmp_path: Path, chromium: str) -> None:
    base, tuned = (judged(name, QUESTIONS, [row[at] for row in ROWS]) for at, name in ((2, "base"), (3, "tuned")))
    address = write(tmp_path / "comparison.html", tuned, base)
    # Nothing was generated, and the models' tokens are not the same: losses are shown, and no difference of them.
    mute = [[Asked(number, (), (), (), number + 1.0, count) for number in range(3)] for count in (4, 5)]
    silent = write(tmp_path / "silent.html", *(judge("mute", QUESTIONS, asked, ["loss"]) for asked in mute))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1500})
        asked: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        check(page)
        if os.environ.get("ERNIE_SCREENSHOTS"):
            page.screenshot(path=Path(os.environ["ERNIE_SCREENSHOTS"]) / "comparison.png")
        page.goto(silent)
        expect(page.locator(".metrics")).to_contain_text("other tokens, not comparable")
        expect(page.locator("#rows tr")).to_have_count(3)
        expect(page.locator("#rows tr").first.locator("td").last).to_contain_text("–0.20 → 0.25")
        assert asked == [address, silent] and problems == []
        browser.close()


def check(page: Page) -> None:
    rows = page.locator("#rows tr")
    page.select_option("#metric", "rouge_l_chars")
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text("青芷产于哪里？")  # gained most
    expect(rows.first.locator("td").nth(1)).to_have_text("青芷产于琼崖。")
    page.select_option("#order", "worst")
    expect(rows.first).to_contain_text("云苓可治什么？")
    expect(rows.first.locator("td").nth(3)).to_contain_text("cut off")
    page.select_option("#metric", "loss")  # the lower the better, and here it grows with the answer
    expect(rows.first).to_contain_text("青芷产于哪里？")
    expect(rows.last).to_contain_text("白芷")
    page.select_option("#which", "cut")
    expect(rows).to_have_count(1)
    page.select_option("#which", "all")
    page.fill("#search", "白芷")
    expect(rows).to_have_count(1)
    expect(rows.first.locator("td").first).to_have_text("<b>白芷</b></script>是什么？")
    expect(rows.first.locator("img")).to_have_count(0)
    expect(page).to_have_title("tuned – evaluation")
    page.fill("#search", "")
