"""The report in a browser: sorting and filters, no script, narrow screens, dark and print, and no foreign script runs.

Needs Chromium and its driver (`make browser`); skips without, unless REPORT_BROWSER=required, as in CI.
"""

from __future__ import annotations

import os
import shutil

import pytest

from harness.report import page
from tests.report_run import make
from tests.test_report import HOSTILE

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER) and os.environ.get("REPORT_BROWSER") != "required",
    reason="Chromium and chromedriver are not installed: make browser",
)
LINES = "#task-0-lines tbody tr"


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """A report whose every foreign word is hostile."""
    folder = make(tmp_path_factory.mktemp("runs"), text=HOSTILE)
    return page.make(folder).page.absolute().as_uri()


@pytest.fixture(scope="module")
def chrome():
    """One browser for all tests."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to run as root otherwise
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def shown(chrome, address):
    """The report, opened anew at the width of a desk."""
    chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    # still: the page scrolls smoothly elsewhere, and a click on what moves hits something else
    still = {"name": "prefers-reduced-motion", "value": "reduce"}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [still]})
    _width(chrome, 1280)
    chrome.get(address)
    return chrome


def _width(chrome, pixels: int) -> None:
    chrome.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": pixels < 600},
    )


def column(chrome, header: str, table: str = "#task-0-lines") -> list[str]:
    """Return the texts of a column in the lines that are to be seen."""
    return chrome.execute_script(
        """const [table, header] = [document.querySelector(arguments[0]), arguments[1]];
        const index = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.trim() === header);
        return [...table.tBodies[0].rows].filter((row) => row.offsetHeight > 0)
            .map((row) => row.cells[index].textContent.trim());""",
        table,
        header,
    )


def choose(chrome, name: str, text: str) -> None:
    """Choose an entry of a filter."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    Select(chrome.find_element(By.CSS_SELECTOR, f"form select[name={name}]")).select_by_visible_text(text)


def press(chrome, header: str) -> None:
    """Press the header of a column of the leaderboard."""
    from selenium.webdriver.common.by import By

    (found,) = (
        button
        for button in chrome.find_elements(By.CSS_SELECTOR, "#task-0-lines thead button")
        if button.text.strip(" ▲▼") == header
    )
    chrome.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", found)
    found.click()


def test_filters_show_what_is_chosen(shown):
    """First one metric at the last step; then an attack alone; then all: 3 defenses, 2 attacks, 2 steps, 2 metrics."""
    assert set(column(shown, "metric")) == {"clip"} and set(column(shown, "step")) == {"40"}
    assert len(column(shown, "step")) == 6

    choose(shown, "attack", "dreambooth")
    assert column(shown, "attack") == ["dreambooth"] * 3
    assert "3 of 24 lines" in shown.execute_script("return document.querySelector('form output').textContent")

    choose(shown, "metric", "distance")
    choose(shown, "step", "10")
    assert column(shown, "metric") == ["distance"] * 3 and column(shown, "step") == ["10"] * 3

    shown.execute_script("document.querySelector('form.filters button').click()")
    assert len(column(shown, "step")) == 24


def test_headers_sort_both_ways(shown):
    """Numbers as numbers, what is undefined last either way; the header shows the direction."""
    choose(shown, "attack", "lora")
    press(shown, "SGR %")
    values = [float(text) for text in column(shown, "SGR %")]
    assert values == sorted(values, reverse=True) and column(shown, "defense") == ["mine", "theirs", "none"]

    press(shown, "SGR %")
    assert column(shown, "defense") == ["none", "theirs", "mine"]
    assert shown.execute_script("return document.querySelectorAll('#task-0-lines th[aria-sort=ascending]').length") == 1

    for _ in range(2):
        press(shown, "95 %")  # of the undefended model itself there is none
        assert column(shown, "defense")[-1] == "none" and column(shown, "95 %")[-1] == "–"


def test_all_is_there_without_scripts(shown, address):
    """Every line is to be seen, and no filter that would do nothing."""
    shown.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    shown.get(address)

    def heights(selector: str) -> list[int]:
        # the driver may ask where the page's own scripts may not run
        return shown.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((one) => one.offsetHeight);", selector
        )

    lines = heights(LINES)
    assert len(lines) == 24 and min(lines) > 0
    assert heights(".filters") == [0]
    shown.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_hangs_over_the_edge(shown, width):
    """Wide tables and figures scroll by themselves, the page does not."""
    _width(shown, width)

    shown.execute_script("document.querySelectorAll('details').forEach((one) => one.open = true)")

    assert shown.execute_script("return document.documentElement.scrollWidth") <= width


def test_ground_and_ink_follow_the_reader(shown):
    """Dark on light, light on dark; paper is white."""

    def lightness(*features) -> tuple[float, float]:
        media, *rest = features
        shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": rest})
        return tuple(
            shown.execute_script(
                """const style = getComputedStyle(document.body);
                return [style.backgroundColor, style.color].map((text) =>
                    text.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765);"""
            )
        )

    dark = {"name": "prefers-color-scheme", "value": "dark"}
    ground, ink = lightness("", {"name": "prefers-color-scheme", "value": "light"})
    assert ground > 0.9 and ink < 0.2
    ground, ink = lightness("", dark)
    assert ground < 0.2 and ink > 0.8
    ground, ink = lightness("print", dark)
    assert ground == 1.0 and ink == 0.0


def test_images_load_and_nothing_is_refused(shown):
    """Each picture has pixels; the browser's log is empty: no missing file, no refused script."""
    shown.execute_script(
        """document.querySelectorAll('details').forEach((one) => one.open = true);
        document.querySelectorAll('img').forEach((one) => one.loading = 'eager');"""
    )
    broken = shown.execute_async_script(
        """const done = arguments[0];
        Promise.all([...document.images].map((image) => image.decode().then(() => null, () => image.src)))
            .then((found) => done(found.filter(Boolean)));"""
    )

    assert broken == []
    assert [entry["message"] for entry in shown.get_log("browser")] == []


def test_no_foreign_script_runs(shown):
    """Hostile names, prompts and errors are on this page."""
    assert shown.execute_script("return typeof hacked") == "undefined"
    assert "<script>hacked=1</script>" in shown.execute_script("return document.body.textContent")
