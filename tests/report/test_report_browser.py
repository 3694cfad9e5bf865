"""The page in a real browser: no error, quick, usable on a phone, by keyboard and in the dark."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from study_runs import new

import spansearch as ss
from spansearch.report import ReportServer, serve

playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[browser]', and a Chromium")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet")]

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUICK = 1000  # ms in which the page has to open, and to answer


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def file(study: ss.Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study.report(tmp_path_factory.mktemp("page") / "report.html")


class Opened:
    """A page that notes what goes wrong in it, and what it asks the network for."""

    def __init__(self, browser: Any, url: str, width: int = 1280, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda said: self._note(said.type, said.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#front-chart svg")

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.errors.append(text)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def choose(self, label: str, value: str) -> None:
        self.page.locator("#front-controls label", has_text=label).locator("select").select_option(value)


@pytest.fixture
def opened(browser: Any, file: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    made = Opened(browser, file.as_uri(), **getattr(request, "param", {}))
    yield made
    made.page.close()
    assert made.errors == []


def marks(page: Any, box: str = "#front-chart") -> int:
    return int(page.locator(f"{box} .mark").count())


def test_it_asks_for_nothing_and_labels_stay_texts(opened: Opened, file: Path) -> None:
    assert [url for url in opened.asked if not url.startswith("data:")] == [file.as_uri()]
    assert "owned" not in opened.page.title() and opened.page.locator("img").count() == 0
    failures = opened.text("#failures")
    assert "<img src=x onerror" in failures and "</script>" in failures and "hunter2" not in failures


def test_every_axis_can_be_chosen(opened: Opened, data: dict[str, Any]) -> None:
    front = len(data["fronts"]["latency score_drop"])
    for across in ("flops", "params", "latency"):
        for up in ("score_drop", "loss", "divergence"):
            for of in ("validation", "test", "both"):
                opened.choose("across", across)
                opened.choose("up", up)
                opened.choose("of", of)
                assert across[:4] in opened.text("#front-chart")
                if (up, of) != ("loss", "test"):  # what a loss is on test, nobody needs
                    assert marks(opened.page) > 0, (across, up, of)
    opened.choose("across", "latency")
    opened.choose("up", "score_drop")
    opened.choose("of", "test")
    assert opened.page.locator("#front-chart .bar").count() >= front


def test_a_click_shows_the_recipe_and_how_to_take_it_away(opened: Opened, data: dict[str, Any]) -> None:
    opened.choose("of", "validation")
    number = data["fronts"]["latency score_drop"][-1]
    mark = opened.page.locator(f'#front-chart .mark[data-key="{number}"]')
    box = mark.bounding_box()
    opened.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    shown = opened.text("#details")
    trial = next(one for one in data["trials"] if one["number"] == number)
    assert f"Trial {number}" in shown and f'study.member({number}).export("trial-{number}.pt2")' in shown
    for splice in trial["recipe"]:
        assert f"in place of {splice['start']} → {splice['stop']}" in shown
        assert "flops before" in shown
    assert "input" in shown and "head" in shown
    assert opened.page.locator("#details .chain .new").count() == len(trial["recipe"])
    assert opened.page.evaluate("location.hash") == f"#trial={number}"


def test_a_trial_can_be_linked_to(browser: Any, file: Path, data: dict[str, Any]) -> None:
    failed = next(one for one in data["trials"] if one["state"] == "failed")
    made = Opened(browser, f"{file.as_uri()}#trial={failed['number']}")
    assert "<img src=x" in made.text("#details") and not made.errors
    made.page.close()


def test_the_keyboard_reaches_every_point(opened: Opened) -> None:
    page = opened.page
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#front-chart') !== null"):
            break
    else:
        pytest.fail("Tab does not come to the chart")
    seen = set()
    page.keyboard.press("Home")
    for _ in range(marks(page)):
        seen.add(page.evaluate("document.activeElement.getAttribute('data-key')"))
        page.keyboard.press("ArrowRight")
    assert len(seen) == marks(page)
    outline = page.evaluate("getComputedStyle(document.activeElement.querySelector('.halo')).strokeWidth")
    assert outline == "3px"
    page.keyboard.press("Enter")
    assert re.search(r"Trial \d+", opened.text("#details"))
    assert page.evaluate("document.activeElement.classList.contains('chosen')"), "the focus stays"
    assert page.locator("#front-chart .mark[tabindex='0']").count() == 1, "one stop for Tab"
    assert page.locator("#heat-chart .cell[tabindex='0']").count() == 1


def test_cells_of_the_heat_map_say_what_was_tried(opened: Opened, data: dict[str, Any]) -> None:
    page = opened.page
    assert page.locator("#heat-chart .cell").count() > 3
    page.locator("#heat-chart .cell[tabindex='0']").focus()
    page.keyboard.press("Enter")
    start, stop = re.match(r"(.*?) → (.*?): ridge error", opened.text("#heat-caption")).groups()
    assert f"{start} -> {stop}" in data["linear_errors"]
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.classList.contains('cell')")


@pytest.mark.parametrize("opened", [{"width": 380}, {"width": 380, "dark": True}], indirect=True)
def test_a_phone_scrolls_in_one_direction(opened: Opened) -> None:
    page = opened.page
    page.locator("#front-table td button").first.click()
    page.locator("#trials").evaluate("box => { box.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    for chart in ("#front-chart", "#heat-chart", "#family-chart", "#growth-chart"):
        box = page.locator(f"{chart} svg").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 380
    small = page.evaluate(
        "[...document.querySelectorAll('.controls select, .controls label')]"
        ".filter(one => one.getBoundingClientRect().height < 30).length"
    )
    assert small == 0, "fingers need room"


@pytest.mark.parametrize("opened", [{}, {"dark": True}], indirect=True, ids=["light", "dark"])
def test_texts_and_marks_stand_out(opened: Opened) -> None:
    """WCAG: 4.5 to 1 for texts, 3 to 1 for what is drawn."""
    names = "ink soft link black orange sky green yellow blue vermillion purple grey"
    colours = opened.page.evaluate(
        """(names) => {
          const style = getComputedStyle(document.documentElement);
          const of = (name) => style.getPropertyValue('--' + name).trim();
          return [of('card'), Object.fromEntries(names.map((name) => [name, of(name)]))];
        }""",
        names.split(),
    )
    card, named = colours
    for name, colour in named.items():
        least = 4.5 if name in ("ink", "soft", "link") else 3.0
        assert contrast(card, colour) >= least, (name, contrast(card, colour))


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_five_hundred_trials_open_and_answer_within_a_second(browser: Any, tmp_path: Path) -> None:
    study = new(tmp_path, "mlp")
    study.run(500)
    file = study.report()
    assert file.stat().st_size <= 6 << 20
    made = Opened(browser, file.as_uri())
    page = made.page
    took = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert took <= QUICK, took
    actions = {
        "choose": "document.querySelector('#front-table td button').click()",
        "all trials": "document.querySelector('#trials').open = true",
        "log": "document.querySelector('#front-controls input').click()",
    }
    for name, action in actions.items():
        took = page.evaluate(
            f"async () => {{ const begun = performance.now(); {action}; await new Promise((done) => "
            "requestAnimationFrame(() => setTimeout(done))); return performance.now() - begun; }"
        )
        assert took <= QUICK, (name, took)
    assert not made.errors
    page.close()


def test_it_follows_a_run(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "FRESH", 0.0)
    study = new(tmp_path)
    study.run(2)
    with ReportServer(new(tmp_path).report_data) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            made = Opened(browser, server.url)
            assert made.text("#standing").startswith("2 trials finished")
            made.page.locator("#front-table td button").first.click()
            before = made.text("#details")
            study.run(5)
            until = time.monotonic() + 15
            while time.monotonic() < until and not made.text("#standing").startswith("5 trials"):
                made.page.wait_for_timeout(200)
            assert made.text("#standing").startswith("5 trials finished")
            assert made.text("#details").splitlines()[0] == before.splitlines()[0], "the choice stays"
            assert not made.errors
            made.page.close()
        finally:
            server.shutdown()
            thread.join()
