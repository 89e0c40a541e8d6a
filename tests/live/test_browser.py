"""The docs page in a real browser: what it shows, what "Try it out" does, and whom the browser talks to."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import element_to_be_clickable, visibility_of_element_located
from selenium.webdriver.support.wait import WebDriverWait

from tests.live.service import WAIT_SECONDS, Service, needed, running

FLAGS = (
    "--headless",
    "--no-sandbox",  # CI runs as root in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1200,1600",
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Debian's chromium, with no profile, logging every request that pages make."""
    options = ChromeOptions()
    options.binary_location = needed("chromium", "chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = Chrome(options, ChromeService(needed("chromedriver", "chromium-driver")))
    try:
        yield browser
    finally:
        browser.quit()


def shown(browser: Chrome, selector: str) -> WebElement:
    element: WebElement = WebDriverWait(browser, WAIT_SECONDS).until(
        visibility_of_element_located((By.CSS_SELECTOR, selector))
    )
    return element


def click(browser: Chrome, selector: str) -> None:
    WebDriverWait(browser, WAIT_SECONDS).until(element_to_be_clickable((By.CSS_SELECTOR, selector))).click()


def log(browser: Chrome, kind: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = browser.get_log(kind)  # type: ignore[no-untyped-call]  # selenium's own lack
    return entries


def requested(browser: Chrome) -> list[dict[str, Any]]:
    """The requests of pages since this was last called, as the browser's own network log has them."""
    events = [json.loads(entry["message"])["message"] for entry in log(browser, "performance")]
    return [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]


def test_the_page(service: Service, browser: Chrome) -> None:
    """It lists the endpoints, tries one of them out, and asks nobody but the service for anything."""
    origin = f"http://127.0.0.1:{service.port}"
    browser.get(f"{origin}/docs")
    shown(browser, "#operations-default-predict")
    paths = [element.get_attribute("data-path") for element in browser.find_elements(By.CSS_SELECTOR, "[data-path]")]
    document = service.get("/openapi.json").json
    assert sorted(map(str, paths)) == sorted(path for path, methods in document["paths"].items() for _ in methods)
    assert {"/predict", "/square_numbers", "/health", "/metrics"} <= set(paths)
    assert not browser.find_elements(By.CSS_SELECTOR, ".btn.authorize")  # without API_KEYS there is nothing to enter
    assert shown(browser, ".info .title").text.startswith("Inference API")

    click(browser, "#operations-default-predict .opblock-summary-control")
    click(browser, "#operations-default-predict .try-out__btn")
    body = shown(browser, "#operations-default-predict textarea.body-param__text").get_attribute("value")
    assert json.loads(str(body)) == {"text": "Hello"}
    click(browser, "#operations-default-predict .execute")
    answer = "#operations-default-predict .live-responses-table tr.response "
    assert "predicted(Hello)" in shown(browser, answer + ".response-col_description pre").text
    assert shown(browser, answer + ".response-col_status").text.startswith("200")

    requests = requested(browser)
    posted = [request for request in requests if request["method"] == "POST"]
    assert [(request["url"], json.loads(request["postData"])) for request in posted] == [
        (f"{origin}/predict", {"text": "Hello"})
    ]
    urls = [urlsplit(request["url"]) for request in requests]
    inner = ("data", "blob", "chrome")  # no hosts; the last is of the page that the browser starts with
    assert {f"{url.scheme}://{url.netloc}" for url in urls if url.scheme not in inner} == {origin}
    assert {"/docs", "/docs/start.js", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/openapi.json"} <= {
        url.path for url in urls
    }
    assert [entry["message"] for entry in log(browser, "browser") if entry["level"] == "SEVERE"] == []
