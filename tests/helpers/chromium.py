"""Headless Chromium for the tests of the report: how it is started, and what a user sees and does on a page."""

from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


def is_installed() -> bool:
    return CHROMIUM.exists() and DRIVER.exists()


def start(profile: Path) -> webdriver.Chrome:
    """A browser that keeps what it logs; `profile` is an empty folder of its own. `quit()` ends it."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update",
        f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(executable_path=str(DRIVER)))


def size(browser, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def colours(browser, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def find(browser, selector: str):
    return browser.find_element(By.CSS_SELECTOR, selector)


def head(browser, column: str, table: str = "collection-table"):
    """The head of a column, by its name."""
    heads = browser.find_elements(By.CSS_SELECTOR, f"#{table} thead th")
    return next(one for one in heads if one.get_attribute("textContent").strip() == column)


def shown(browser, column: str = "Dataset", table: str = "collection-table") -> list[str]:
    """The texts of a column, of the rows that are to be seen, from above."""
    texts = """
        const [head, table] = arguments, place = [...head.parentNode.children].indexOf(head);
        const rows = document.querySelectorAll(`#${table} tbody tr:not([hidden])`);
        return [...rows].map((row) => row.children[place].textContent.trim())"""
    return browser.execute_script(texts, head(browser, column, table), table)


def typed(browser, text: str, table: str = "collection-table") -> None:
    """Type into the filter of a table, in place of what it had."""
    box = find(browser, f"input[data-for={table}]")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(text or Keys.DELETE)


def wait(browser, what):
    """What a function returns once it is true and finds what it looks for."""
    return WebDriverWait(browser, 20).until(lambda _: what())


def drawn(browser, selector: str) -> bool:
    """Scroll pictures into view; whether all are there, drawn."""
    pictures = browser.find_elements(By.CSS_SELECTOR, selector)
    for picture in pictures:
        browser.execute_script("arguments[0].scrollIntoView()", picture)
        wait(browser, lambda picture=picture: picture.find_elements(By.CSS_SELECTOR, ".main-svg .subplot"))
    return bool(pictures)


def opened(browser, dataset: str = "Toy"):
    """Open a collection by its name in the table; the article."""
    names = browser.find_elements(By.CSS_SELECTOR, "#collection-table .open")
    next(name for name in names if name.text == dataset).click()
    return wait(browser, lambda: find(browser, "#opened article"))
