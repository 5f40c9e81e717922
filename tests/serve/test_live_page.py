"""The page: it asks for nothing from elsewhere, and in a browser it shows what the server says and moves it.

The browser is a Chromium that Playwright has installed, or the one that FOVEATE_CHROMIUM names.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from served import Served


def _event(response: HTTPResponse) -> Any:
    line = b""
    while not line.startswith(b"data: "):
        line = response.readline()
        assert line
    return json.loads(line[6:])


def test_the_page_is_one_file_and_asks_for_nothing_from_elsewhere(served: Served) -> None:
    reply = served.ask("GET", "/")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/html")
    text = reply.body.decode().replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"https?://|//\w|@import|<link|src=", text) == []
    assert "default-src 'none'" in reply.headers["content-security-policy"]


def test_events_have_all_that_the_page_shows(served: Served) -> None:
    response = served.open("GET", "/events")
    first, second = _event(response), _event(response)
    response.close()
    assert first["model"] == "tiny"
    assert len(first["layers"]) == len(list(served.engine.control.frontier[0].weight_sites()))
    assert first["precision"]["index"] == second["precision"]["index"] == 0
    assert {"sensors", "limits", "decisions", "values", "draining"} <= set(first)
    assert served.ask("POST", "/v1/precision", {"index": 3}).status == 200
    response = served.open("GET", "/events")
    third = _event(response)
    response.close()
    assert third["precision"]["held"]
    assert third["decisions"][-1]["index"] == 3
    assert sum(bits for _, bits in third["layers"]) < sum(bits for _, bits in first["layers"])
    assert served.ask("POST", "/v1/precision", {"hold": False}).status == 200


def test_the_dashboard_asks_for_metrics_that_there_are(served: Served) -> None:
    served.complete()
    text = served.ask("GET", "/metrics").body.decode()
    there = set(re.findall(r"^# TYPE (foveate:\w+)", text, re.MULTILINE))
    there |= {f"{name}_bucket" for name in there}
    dashboard = (Path(__file__).parents[2] / "examples" / "grafana.json").read_text(encoding="utf-8")
    asked = set(re.findall(r"foveate:\w+", dashboard))
    assert len(asked) > 8
    assert asked <= there


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as started:
        try:
            found = started.chromium.launch(
                executable_path=os.environ.get("FOVEATE_CHROMIUM"), args=["--no-sandbox", "--single-process"]
            )
        except playwright.Error as error:
            pytest.skip(f"there is no Chromium: {str(error).splitlines()[0]}")
        yield found
        found.close()


def test_the_page_in_a_browser(served: Served, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 950})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda one: wrong.append(one.url) if str(served.port) not in one.url else None)
    page.goto(f"http://127.0.0.1:{served.port}/")
    page.wait_for_selector("#link:text('live')", timeout=60_000)
    assert page.locator("#layers td.cell").count() == len(list(served.engine.control.frontier[0].weight_sites()))
    assert page.locator("#frontier circle").count() == len(served.engine.control.frontier)
    best = page.locator("#layers td.cell").first.evaluate("cell => cell.style.backgroundColor")
    last = len(served.engine.control.frontier) - 1
    page.select_option("#index", str(last))
    page.click("#hold")
    page.wait_for_selector(f"#frontier circle.here[data-index='{last}']", timeout=60_000)
    assert served.engine.control.held == last
    assert "operator" in page.locator("#decisions").inner_text()
    assert page.locator("#layers td.cell").first.evaluate("cell => cell.style.backgroundColor") != best
    served.complete(max_tokens=20)
    if os.environ.get("FOVEATE_SCREENSHOT"):
        page.screenshot(path=os.environ["FOVEATE_SCREENSHOT"], full_page=True)
    page.select_option("#floor", "2")
    page.click("#setfloor")
    page.wait_for_selector("#frontier circle.here[data-index='2']", timeout=60_000)
    page.select_option("#floor", "")
    page.click("#setfloor")
    page.click("#release")
    page.wait_for_selector("#frontier circle.here[data-index='0']", timeout=60_000)
    until = time.monotonic() + 30
    while served.engine.control.held is not None and time.monotonic() < until:
        time.sleep(0.05)
    assert served.engine.control.held is None
    assert wrong == []
    page.close()
