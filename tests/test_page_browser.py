"""Pages in headless Chromium: no error, nothing clipped, readable, and the ways from a point to its command and answers.

SST_PICTURES=1 python -m pytest tests/test_page_browser.py -k pictures    # or `make pictures`: docs/pictures anew
"""

from __future__ import annotations

import os
import shutil

import pytest

from sst_merge.page import html, page_of_comparison, page_of_merge
from tests import page_cases as cases

PAGES = ("merge", "comparison", "hostile")
LONG = "من فضلك " * 400 + "<script>document.title = 'run'</script>" + "x" * 3000
# text that leaves its box or the window; what scrolls by design may be wider than it shows
CLIPPED = """() => {
  const out = [], width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) out.push(`the page is ${document.documentElement.scrollWidth} wide`);
  for (const e of document.querySelectorAll("body *")) {
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    if (!box.width || !box.height || style.visibility === "hidden" || e.closest(".hidden, .scroll, option, .pills input")) continue;
    if (box.right > width + 1 || box.left < -1) out.push(`${e.tagName}.${e.className.baseVal ?? e.className} reaches ${box.left} to ${box.right}`);
    if (!e.closest("svg") && e.scrollWidth > e.clientWidth + 1 && e.clientWidth && style.display !== "inline") out.push(`${e.tagName}.${e.className} holds ${e.scrollWidth} in ${e.clientWidth}`);
  }
  return out;
}"""
# the contrast of every text with what lies behind it
FAINT = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number), lum = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const out = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.checkVisibility() || e.closest("script, style, option")) continue;
    let back = e; while (back && (parse(getComputedStyle(back).backgroundColor)[3] ?? 1) === 0) back = back.parentElement;
    const style = getComputedStyle(e), text = e.closest("svg") ? style.fill : style.color;
    const [a, b] = [lum(parse(text)), lum(parse(getComputedStyle(back ?? document.body).backgroundColor))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) out.push(`${e.tagName}.${e.className.baseVal ?? e.className} ${((a + .05) / (b + .05)).toFixed(1)}: ${e.textContent.slice(0, 30)}`);
  }
  return out;
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install '.[test]')"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with playwright.sync_playwright() as run:
        chromium = run.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    hostile = cases.evaluated() | {"budget": cases.budget(0.042), "front": cases.front()}
    hostile["examples"] = {"harm": [{"text": LONG, "label": False}, {"text": LONG, "label": True}]}
    hostile["budget"]["words"] = hostile["failed_evaluations"]["x"] = "w" * 300
    hostile["recipe"]["output"] = "o" * 300
    pages = {
        "merge": page_of_merge(*cases.measured("merge")),
        "comparison": page_of_comparison(*cases.measured("comparison")),
        "hostile": page_of_merge(hostile, cases.records(LONG, LONG)),
    }
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(html(page), encoding="utf-8")
    return folder


@pytest.fixture
def visit(browser, files):
    """Opens a page; at the end nothing may have been logged, asked of a network, or shown as a dialog."""
    contexts, said = [], []

    def open_(name, width=1400, scheme="light", height=1000, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("dialog", lambda d: (said.append(f"dialog {d.message}"), d.dismiss()))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else said.append(r.url))
        page.goto((files / f"{name}.html").as_uri())
        page.wait_for_selector("#front-chart .points path[tabindex]")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_clipped_or_faint_in_light_and_dark(visit, name, width):
    page = visit(name, width)
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate(FAINT) == []
    light = page.locator("#front-chart .points path").first.get_attribute("fill")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        f"document.querySelector('#front-chart .points path[tabindex]')?.getAttribute('fill') !== '{light}'"
    )
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate(FAINT) == []
    assert page.title() != "run"


def test_every_control_has_a_name(visit):
    for name in PAGES:
        page = visit(name)
        names = page.evaluate(
            "[...document.querySelectorAll('button, select, input, [role=button], summary')].filter(e => e.checkVisibility()).map(e =>"
            " (e.getAttribute('aria-label') || e.textContent || e.labels?.[0]?.textContent || '').trim())"
        )
        assert len(names) > 10
        assert all(names)
        assert page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => h.tagName)").count("H1") == 1


def test_a_point_leads_to_its_command(visit):
    page = visit("merge", permissions=["clipboard-read", "clipboard-write"])
    points = page.locator("#front-chart .points path")
    told = points.first.get_attribute("aria-label")
    points.first.click()
    assert page.locator("#chosen h3").inner_text() == told.split(":")[0]
    command = page.locator("#chosen code").inner_text()
    assert command.startswith("sst-merge merge")
    page.get_by_role("button", name="Copy the command").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == command
    assert page.locator("#points tr.chosen button").inner_text() == told.split(":")[0]
    assert page.locator("#points tr.chosen button").get_attribute("aria-pressed") == "true"


def test_points_are_reached_and_chosen_by_keyboard(visit):
    page = visit("comparison", 390)
    point = page.locator("#front-chart .points path").nth(3)
    point.focus()
    page.keyboard.press("Enter")
    assert page.locator("#chosen h3").inner_text() == point.get_attribute("aria-label").split(":")[0]
    assert page.evaluate("document.activeElement.getAttribute('role')") == "button"  # the point keeps the focus


def test_a_row_leads_to_its_answers(visit):
    page = visit("comparison")
    page.get_by_role("button", name="sst at 0.002", exact=True).focus()
    page.keyboard.press("Enter")
    assert page.locator("#after").input_value() == "sst at 0.002"
    page.locator("#chosen").get_by_role("button", name="Its answers").click()
    _, rows = cases.measured("comparison")
    made = next(r["prompts"] for r in rows if (r["method"], r["strength"]) == ("sst", 0.002))
    refused = [p for p in made if p["refused"]]
    page.get_by_text(f"safe: newly refused · {len(refused)}").click()
    cards = page.locator("#answer-list article")
    assert cards.count() == min(6, len(refused))
    assert cards.first.locator("p").first.inner_text() == refused[0]["prompt"]
    assert refused[0]["answer"].split()[-1] in cards.first.inner_text()
    assert page.evaluate("document.querySelector('#answers').getBoundingClientRect().top < innerHeight")


def test_series_come_and_go_and_rows_are_sorted(visit):
    page = visit("comparison")
    report, _ = cases.measured("comparison")
    count = {m["name"]: sum(r["method"] == m["name"] for r in report["rows"]) for m in report["methods"]}
    points, rows = page.locator("#front-chart .points path"), page.locator("#points tbody tr:visible")
    shown = sum(count[n] for n in ("plain", "sst", "input-filter", "regmean"))
    assert (points.count(), rows.count()) == (shown, shown)
    page.get_by_role("checkbox", name="tsv-m").check()
    page.wait_for_function(
        f"document.querySelectorAll('#front-chart .points path').length === {shown + count['tsv-m']}"
    )
    assert rows.count() == shown + count["tsv-m"]
    page.get_by_role("checkbox", name="plain").uncheck()
    page.wait_for_function(
        f"document.querySelectorAll('#front-chart .points path').length === {shown + count['tsv-m'] - count['plain']}"
    )
    head = page.get_by_role("columnheader", name="benign KL").get_by_role("button")
    values = "[...document.querySelectorAll('#points tbody tr')].map(r => Number(r.cells[2].dataset.value))"
    head.click()
    assert page.evaluate(values) == sorted(page.evaluate(values))
    head.click()
    assert page.evaluate(values) == sorted(page.evaluate(values), reverse=True)
    assert page.locator("#points th[aria-sort=descending]").inner_text().startswith("benign KL")
    page.get_by_label("likelihood of refusals").check()
    page.get_by_text("NLL of refusals, nats per token").wait_for()


def test_long_texts_open_on_demand(visit):
    page = visit("hostile", 390)
    first = page.locator("#answer-list .long").first
    closed = first.bounding_box()["height"]
    page.get_by_role("button", name="Show all of it").first.click()
    assert page.locator("#answer-list article p").first.bounding_box()["height"] > 3 * closed
    assert page.evaluate(CLIPPED) == []


def test_pictures_for_the_documentation(visit, tmp_path):
    """What a reader sees first, and the chart alone; written to docs/pictures where SST_PICTURES is set."""
    folder = cases.PICTURES if os.environ.get("SST_PICTURES") else tmp_path
    visit("merge", 1160, height=1000).screenshot(path=folder / "report.png")
    visit("comparison", 1100, height=860).screenshot(path=folder / "compare.png")
    visit("comparison", 1160, device_scale_factor=2).locator("#front-chart").screenshot(path=folder / "front.png")
    for file in ("report.png", "compare.png", "front.png"):
        assert (folder / file).stat().st_size > 10_000, file
        kept = cases.PICTURES / file
        assert kept.is_file(), f"{kept} is missing: run `make pictures`"
        assert kept.stat().st_size < 150_000, file
