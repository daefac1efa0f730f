"""The page in a real Chromium, opened from disk. What it shows is compared with the run directory's own files.

Not proven: other browsers; that the page is beautiful.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from megarl.bench.common.browser import DESKTOP, PHONE, opened, wait
from megarl.report import write
from megarl.run.directory import read_metrics
from tests.support import synthetic

pytestmark = pytest.mark.browser
STEPS, GROUPS, PER_GROUP = 4, 6, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "hostile"
    synthetic.write(folder, STEPS, GROUPS, PER_GROUP, hostile=True)
    synthetic.write_held_out(folder, STEPS)
    write([folder])
    return folder


@pytest.fixture(scope="module")
def comparison(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    other = synthetic.write(tmp_path_factory.mktemp("runs") / "other", STEPS, GROUPS, PER_GROUP)
    return write([run, other], other / "compared.html")


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def texts(browser: Any, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((n) => n.textContent)", selector
    )


def choose(browser: Any, selector: str, value: object) -> None:
    from selenium.webdriver.support.select import Select

    Select(find(browser, selector)).select_by_value(str(value))


def tip(browser: Any) -> dict[str, str]:
    rows = wait(lambda: browser.execute_script(
        "return [...document.querySelectorAll('#tip:not([hidden]) div')]"
        ".map((r) => [r.querySelector('span').textContent, r.querySelector('b').textContent])"))  # fmt: skip
    return dict(rows)


def hover(browser: Any, element: Any) -> dict[str, str]:
    from selenium.webdriver import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    ActionChains(browser).move_to_element(element).perform()
    return tip(browser)


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_nothing_is_loaded_nothing_complains_nothing_overflows(browser, run, comparison, width):
    """No request but the file itself, an empty console (a violated content policy would be in it), no sideways scroll,
    and the model's markup is text: no element of it exists. The title would be changed by a handler that ran."""
    for page in (run / "report.html", comparison):
        opened(browser, page, width)
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
        assert browser.get_log("browser") == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script("return document.querySelectorAll('img, svg[onload]').length") == 0
        assert "megarl" in browser.title
    assert any(synthetic.HOSTILE in text for text in texts(browser, ".prompt pre, .q"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser, run, comparison, scheme):
    """axe-core's whole rule set, in both colour schemes, on desktop and phone, for a run and for a comparison; then
    with each other colouring of tokens, with what a search finds marked, and with the theme that the button sets."""
    place = importlib.util.find_spec("axe_playwright_python")
    assert place and place.submodule_search_locations, "axe-core comes with `make test-report`"
    axe = (Path(place.submodule_search_locations[0]) / "axe.min.js").read_text()

    def violations():
        found = browser.execute_async_script(
            "axe.run().then((r) => arguments[0](r.violations), (e) => arguments[0](String(e)))"
        )
        assert isinstance(found, list), found
        return [(v["id"], [n["target"] for n in v["nodes"]][:3]) for v in found]

    for page, width in itertools.product((comparison, run / "report.html"), (DESKTOP, PHONE)):
        opened(browser, page, width, scheme)
        browser.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})  # past the page's content policy
        assert violations() == []
    find(browser, "#v-search").send_keys("a")
    wait(lambda: browser.find_elements("css selector", ".t.found"))
    for colouring in ("logprob", "advantage"):
        choose(browser, "#v-colour", colouring)
        wait(lambda: browser.find_elements("css selector", ".t.heat"))
        assert violations() == []
    other = "light" if scheme == "dark" else "dark"
    while other not in find(browser, "#theme").text:
        find(browser, "#theme").click()
    assert violations() == []
    find(browser, "#theme").click()
    browser.execute_script("localStorage.clear()")


def test_every_figure_equals_the_metrics_file(browser, run):
    """At every step every number of metrics.jsonl is in the table, digit by digit; NaN is shown as such."""
    opened(browser, run / "report.html")
    for line in read_metrics(run):
        choose(browser, "#f-step", line["step"])
        keys, values = texts(browser, "#figures tbody th"), texts(browser, "#figures tbody td")
        shown = dict(zip(keys, values, strict=True))
        expected = {k: v for k, v in line.items() if k != "step"}
        assert set(shown) == set(expected)
        for key, value in expected.items():
            assert float(shown[key]) == pytest.approx(value, rel=1e-12, nan_ok=True), key


def test_a_curve_tells_its_points_to_pointer_and_keyboard(browser, run):
    from selenium.webdriver import ActionChains, Keys

    opened(browser, run / "report.html")
    line = read_metrics(run)[1]
    chart = find(browser, '[aria-label="Reward, by step"]')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    chart.send_keys(Keys.HOME)
    assert float(tip(browser)["reward"]) == pytest.approx(line["reward"], rel=1e-3)
    assert tip(browser)["step"] == "1"
    assert f"step {STEPS}" not in chart.get_attribute("aria-valuetext")
    ActionChains(browser).move_to_element_with_offset(chart, chart.size["width"] // 2 - 12, 0).perform()
    assert tip(browser)["step"] == str(STEPS)


def test_the_viewer_shows_what_is_on_disk(browser, run):
    """Step, prompt, filter, search and hover by real clicks, keys and pointer moves; focus by keyboard too."""
    from selenium.webdriver import Keys

    opened(browser, run / "report.html")
    choose(browser, "#v-step", 2)
    records = synthetic.rows(run, 2)
    wait(lambda: "problem 2.0" in texts(browser, ".prompt pre")[0])
    buttons = browser.find_elements("css selector", ".prompts button")
    assert len(buttons) == GROUPS
    buttons[3].click()
    mine = records[3 * PER_GROUP : 4 * PER_GROUP]
    assert "problem 2.3" in find(browser, ".prompt pre").text
    assert [float(t) for t in texts(browser, ".f-reward dd")] == [r["reward"] for r in mine]
    for shown, record in zip(texts(browser, ".f-advantage dd"), mine, strict=True):
        assert float(shown) == pytest.approx(record["advantage"], rel=1e-3)
    assert [t == "dropped" for t in texts(browser, ".f-weight dd")] == [r["weight"] == 0 for r in mine]

    cards = browser.find_elements("css selector", ".completion")
    for card, record in zip(cards, mine, strict=True):
        tokens = card.find_elements("css selector", ".t")
        assert len(tokens) == len(record["response_ids"])
        inserted = [i for i, t in enumerate(tokens) if "inserted" in t.get_attribute("class")]
        assert inserted == [i for i, origin in enumerate(record["origin"]) if origin]
        cut = card.find_elements("css selector", ".pill.cut")
        assert len(cut) == (record["exit_reason"] in ("confident", "budget"))
        assert len(card.find_elements("css selector", ".pill.declined")) == 1
    facts = hover(browser, next(t for t in cards[0].find_elements("css selector", ".t")[5:] if t.text.strip()))
    at = int(facts["position"])
    assert int(facts["id"]) == mine[0]["response_ids"][at]
    assert float(facts["log-prob"]) == pytest.approx(mine[0]["logprobs"][at], abs=6e-4)
    assert float(facts["advantage"]) == pytest.approx(mine[0]["advantage"], rel=1e-3)
    assert float(facts["weight"].split()[0]) == mine[0]["weight"]

    body = cards[1].find_element("css selector", ".tokens")
    body.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    wait(lambda: tip(browser).get("position") == "2")
    assert int(tip(browser)["id"]) == mine[1]["response_ids"][2]

    chip = find(browser, '.chip input[value="wrong"]')
    chip.click()
    right = sum(r["verdict"] == "right" for r in records)
    assert f", {right} completions" in find(browser, ".count").text
    chip.click()
    choose(browser, "#v-kept", "dropped")
    assert f", {sum(r['weight'] == 0 for r in records)} completions" in find(browser, ".count").text
    choose(browser, "#v-kept", "")
    find(browser, "#v-search").send_keys("problem 2.5")
    assert f"1 prompts, {PER_GROUP} completions" in find(browser, ".count").text
    find(browser, "#v-search").clear()
    find(browser, "#v-search").send_keys("problem 4.1")
    find(browser, "#v-everywhere").click()
    wait(lambda: f"{PER_GROUP} completions match" in find(browser, ".hits").text)
    find(browser, ".hits button").click()
    wait(lambda: "problem 4.1" in texts(browser, ".prompt pre")[0])
    assert browser.get_log("browser") == []


def test_held_out_responses_are_read_like_rollouts(browser, run):
    """The page begins with the newest rollouts. The list leaves out what all prompts share; a card has the grader's
    number and message."""
    opened(browser, run / "report.html")
    assert find(browser, "#v-step").get_attribute("value") == str(STEPS)
    choose(browser, "#v-step", f"eval-{STEPS}")
    wait(lambda: texts(browser, ".prompt pre")[0].startswith("system"))
    assert f"{STEPS}, held-out" in texts(browser, "#v-step option")
    assert texts(browser, ".q") == [f"question {STEPS}.{g}" for g in range(GROUPS)]
    assert texts(browser, ".message") == [f"why {i}" for i in range(PER_GROUP)]
    assert all(text.endswith(", score 0.75") for text in texts(browser, ".completion .verdict"))
    assert texts(browser, ".f-advantage dd") == ["–"] * PER_GROUP
    assert browser.get_log("browser") == []


def test_settings_that_differ_are_marked(browser, run):
    opened(browser, run / "report.html")
    shown = [r.text for r in browser.find_elements("css selector", "#settings tbody tr") if r.is_displayed()]
    assert any("pruning.completions" in text and "0.5" in text for text in shown)
    assert not any("optimizer.lr" in text for text in shown)
    find(browser, "#changed").click()
    assert len([r for r in browser.find_elements("css selector", "#settings tbody tr") if r.is_displayed()]) > 80


def test_ten_thousand_rollouts_open_in_three_seconds(tmp_path, monkeypatch, record_property, bench):
    """`megarl bench report` on responses of about 220 tokens, each with its log-prob: nothing is left out. Opening is
    from the order to open until curves, tables and the newest step's group stand; the slowest of six loads counts, at
    both widths. Picking the oldest step shows it as fast."""
    monkeypatch.chdir(synthetic.MODEL.parents[2])
    bench("report", "--json", tmp_path / "report.json", "--tokens", 200, "--repeats", 3)
    [row] = json.loads((tmp_path / "report.json").read_text())["rows"]
    for key, value in row.items():
        record_property(key, value)
    assert row["rollouts"] == row["shown"] == 10_000
    assert row["page_mb"] <= 25
    assert row["open_seconds_worst"] <= 3
    assert row["step_seconds"] <= 3
