"""Pages in a real browser: they open from disk, fetch nothing, sort, fold, and can be read on any screen."""

import pytest

from attack_reports import attacks_report
from bench_reports import bench_report
from chromium import FAINT_TEXTS, needs_chromium, requested, show
from deltaguard.reports.attacks import attacks_page
from deltaguard.reports.bench import bench_page
from deltaguard.reports.demo import demo_page
from deltaguard.reports.evaluation_page import evaluation_page
from deltaguard.reports.restore import restore_page
from deltaguard.reports.sweep import sweep_page
from reports import SECTIONS, evaluation_report, sweep_report
from restores import LLAMA, demo_report, layer, restore_report

pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

pytestmark = needs_chromium
LAYERS = tuple(
    layer(name.format(block), kept=(7 * block + 3 * kind) % 10 / 10)
    for block in range(4)
    for kind, name in enumerate(LLAMA)
)
PAGES = {
    "attackers": lambda: attacks_page(attacks_report()),
    "bench": lambda: bench_page(bench_report()),
    "demo": lambda: demo_page(demo_report()),
    "evaluation": lambda: evaluation_page(evaluation_report()),
    "restore": lambda: restore_page(restore_report(layers=LAYERS)),
    "sweep": lambda: sweep_page(sweep_report()),
}

# Of each section of an evaluation: how tall the charts and tables in each of its columns are together.
COLUMN_HEIGHTS = """
return [...document.querySelectorAll("main > h2 + p + div")].filter((group) => group.querySelector("figure"))
  .map((group) => {
    const columns = {};
    for (const part of group.children) {
      const box = part.getBoundingClientRect();
      columns[Math.round(box.left)] = (columns[Math.round(box.left)] || 0) + box.height;
    }
    return Object.values(columns);
  });
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, draw in PAGES.items():
        (folder / f"{name}.html").write_text(draw(), encoding="utf-8")
    return folder


@pytest.fixture(params=PAGES)
def page(request, browser, written):
    """The browser with one page open, its logs emptied before."""
    show(browser, width=1200, dark=False)
    open_page(browser, written / f"{request.param}.html")
    return browser


def open_page(browser, path):
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(path.as_uri())


def column(browser, table, place):
    """The numbers by which a column sorts, None where a cell has none, in the order of the rows."""
    values = browser.execute_script(
        "return [...arguments[0].tBodies[0].rows].map((row) => row.cells[arguments[1]].dataset.value)",
        table,
        place,
    )
    return [float(value) if value else None for value in values]


def ordered(values, *, reverse=False):
    numbers = sorted((value for value in values if value is not None), reverse=reverse)
    return [*numbers, *[None] * (len(values) - len(numbers))]


def numeric_headers(browser):
    """Each table with a column of different numbers, and the first such column."""
    found = []
    for table in browser.find_elements(By.TAG_NAME, "table"):
        headers = table.find_elements(By.CSS_SELECTOR, "thead th")
        for place in range(1, len(headers)):
            values = column(browser, table, place)
            if len({value for value in values if value is not None}) > 1:
                found.append((table, place))
                break
    return found


def unfold(browser):
    browser.execute_script("document.querySelectorAll('details').forEach((one) => (one.open = true))")


def test_a_page_opens_from_disk_without_errors_and_fetches_nothing(page):
    urls = requested(page)
    assert page.current_url in urls
    assert all(url.startswith(("file:", "data:")) for url in urls)
    assert [url for url in urls if url.startswith("file:")] == [page.current_url]
    assert page.get_log("browser") == []
    assert page.find_elements(By.TAG_NAME, "h1")


def test_a_foreign_script_does_not_run(browser, written, tmp_path):
    text = (written / "demo.html").read_text(encoding="utf-8")
    changed = tmp_path / "changed.html"
    foreign = "<script>window.foreign = 1</script><img src=x onerror='window.foreign = 2'>"
    changed.write_text(text.replace("</footer>", f"</footer>{foreign}"), encoding="utf-8")
    open_page(browser, changed)
    assert browser.execute_script("return window.foreign") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
    assert browser.find_elements(By.CSS_SELECTOR, "thead button")


def test_a_click_on_a_header_sorts_by_number_and_another_turns_it_round(page):
    unfold(page)
    tables = numeric_headers(page)
    assert tables
    for table, place in tables:
        header = table.find_elements(By.CSS_SELECTOR, "thead th")[place]
        before = column(page, table, place)
        button = header.find_element(By.TAG_NAME, "button")
        page.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", button)
        button.click()
        assert header.get_attribute("aria-sort") == "ascending"
        assert column(page, table, place) == ordered(before)
        button.click()
        assert header.get_attribute("aria-sort") == "descending"
        assert column(page, table, place) == ordered(before, reverse=True)
        assert len(table.find_elements(By.CSS_SELECTOR, "[aria-sort]")) == 1
    assert page.get_log("browser") == []


@pytest.mark.parametrize("key", [Keys.ENTER, Keys.SPACE])
def test_the_keyboard_sorts_too(page, key):
    unfold(page)
    table, place = numeric_headers(page)[0]
    header = table.find_elements(By.CSS_SELECTOR, "thead th")[place]
    before = column(page, table, place)
    button = header.find_element(By.TAG_NAME, "button")
    page.execute_script("arguments[0].focus()", button)
    page.switch_to.active_element.send_keys(key)
    assert column(page, table, place) == ordered(before)
    assert page.switch_to.active_element == button


def test_sorting_is_stable_and_texts_sort_by_their_words(browser, written):
    open_page(browser, written / "bench.html")
    unfold(browser)
    table = next(
        t for t in browser.find_elements(By.TAG_NAME, "table") if "Points of the curves" in t.text[:40]
    )
    rows = "return [...arguments[0].tBodies[0].rows].map((row) => [...row.cells].map((c) => c.textContent))"
    before = browser.execute_script(rows, table)
    for place in (1, 0):
        headers = table.find_elements(By.CSS_SELECTOR, "thead button")
        browser.execute_script("arguments[0].click()", headers[place])
    after = browser.execute_script(rows, table)
    assert after == sorted(sorted(before, key=lambda row: row[1]), key=lambda row: row[0])
    assert after != before


@pytest.mark.parametrize("name", ["demo", "evaluation"])
def test_answers_stay_text_and_harmful_ones_are_folded(browser, written, name):
    open_page(browser, written / f"{name}.html")
    assert browser.execute_script("return document.scripts.length") == 1
    folded = browser.find_elements(By.CSS_SELECTOR, "article details")
    assert len(folded) == 1
    answers = folded[0].find_elements(By.CSS_SELECTOR, ".answers p")
    assert not any(answer.is_displayed() for answer in answers)
    folded[0].find_element(By.TAG_NAME, "summary").click()
    assert any(answer.text == "harmful answer <script>alert(1)</script>" for answer in answers)
    shown = browser.find_elements(By.CSS_SELECTOR, "article > .answers p")
    assert shown
    assert all(answer.is_displayed() for answer in shown)


@pytest.mark.parametrize("width", [390, 768, 1200])
def test_nothing_overflows_the_page(page, width):
    show(page, width=width, dark=False)
    unfold(page)
    inner, body = page.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]")
    assert inner == width
    assert body <= width


@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1200, 2)])
def test_no_column_of_a_section_stays_blank(browser, tmp_path, width, columns):
    report = evaluation_report()
    told = [measure for measure in report.measures if measure.judge or measure.name != "incoherent"]
    path = tmp_path / "evaluation.html"
    path.write_text(evaluation_page(report.model_copy(update={"measures": told})), encoding="utf-8")
    open_page(browser, path)
    show(browser, width=width, dark=False)
    heights = browser.execute_script(COLUMN_HEIGHTS)
    assert len(heights) == sum("/" not in section.name for section in SECTIONS)
    assert {len(section) for section in heights} == {columns}
    assert all(min(section) > 0.5 * max(section) for section in heights)


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_stands_out_from_its_ground(page, dark):
    show(page, width=1200, dark=dark)
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 28)" if dark else "rgb(244, 245, 247)")
    seen, faint = page.execute_script(FAINT_TEXTS)
    assert seen > 50
    assert faint == []


def test_without_the_script_headers_are_plain_text(browser, written):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        open_page(browser, written / "evaluation.html")
        assert browser.find_elements(By.CSS_SELECTOR, "thead button") == []
        headers = browser.find_elements(By.CSS_SELECTOR, "thead th")
        assert "attack success" in [header.text for header in headers]
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
