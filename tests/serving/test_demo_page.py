"""The page of the server: whole, from the package alone, and used in headless Chromium as a reader uses it."""

from __future__ import annotations

import importlib.resources
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_toys import Running, running
from page_checks import PageReader

from jaxspec.pages.chromium import OpenPage, find_chromium, open_page
from jaxspec.serving import api_reply
from jaxspec.serving.outbox import Delta

needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("models")) as one:
        yield one


def fetched(served: Running, path: str) -> tuple[str, Any]:
    with urllib.request.urlopen(served.url + path, timeout=60) as response:
        return response.read().decode(), response.headers


def test_the_page_is_whole_and_loads_its_own_files_alone(served: Running):
    text, headers = fetched(served, "/")
    read = PageReader(text)
    assert {address for address in read.loads if not address.startswith(("#", "data:"))} == {"/demo.css", "/demo.js"}
    assert len(set(read.ids)) == len(read.ids)
    labels = {given["for"] for name, given in read.attributes if name == "label"}
    assert labels == {given["id"] for name, given in read.attributes if name in ("input", "textarea")}
    assert not [name for name, given in read.attributes if any(key.startswith("on") or key == "style" for key in given)]
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and headers["x-content-type-options"] == "nosniff"
    for path, kind in (("/demo.css", "text/css"), ("/demo.js", "text/javascript")):
        text, headers = fetched(served, path)
        assert headers["content-type"].startswith(kind) and "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_script_sets_text_as_text_alone():
    script = importlib.resources.files("jaxspec.serving").joinpath("demo.js").read_text()
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|DOMParser", script)


def answer(page: OpenPage, **fields: Any) -> str:
    """Fills the form, sends it, and returns the last status."""
    for name, value in fields.items():
        page.evaluate(f"document.getElementById({name!r}).value = {value!r}; 1")
    page.evaluate("document.getElementById('start').click(); 1")
    deadline = time.monotonic() + 60
    while True:
        status = page.evaluate(
            "document.getElementById('start').disabled ? '' : document.getElementById('status').textContent"
        )
        if status:
            return status
        assert time.monotonic() < deadline
        time.sleep(0.05)


def figure(page: OpenPage, arm: str, name: str) -> float:
    return float(page.evaluate(f"document.querySelector('#{arm} [data-figure={name}]').textContent"))


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, False), (360, True)])
def test_both_answers_stream_side_by_side_with_their_figures(served: Running, tmp_path: Path, width: int, dark: bool):
    with open_page(served.url + "/", width=width, dark=dark) as page:
        status = answer(page, prompt="3 and 4 make", temperature=0.7, most=60, seed=5)
        assert status.startswith("Done: ") and status.endswith("the texts are the same.")
        texts = [
            page.evaluate(f"document.querySelector('#{arm} .answer').textContent") for arm in ("plain", "speculative")
        ]
        assert texts[0] == texts[1] != ""
        tokens, rounds = figure(page, "speculative", "tokens"), figure(page, "speculative", "rounds")
        assert figure(page, "plain", "rounds") == tokens - 1 and figure(page, "plain", "tau") == 1
        assert figure(page, "speculative", "tau") == pytest.approx((tokens - 1) / rounds, abs=0.006)
        assert figure(page, "speculative", "speed") > 0
        drawn = "document.querySelectorAll('svg.tree {}').length"
        assert page.evaluate(drawn.format("rect")) >= 1
        assert page.evaluate(drawn.format("rect")) + page.evaluate(drawn.format("circle")) == 8
        assert page.evaluate("document.querySelector('svg.tree title').textContent").startswith("Round ")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == dark
        (tmp_path / "page.png").write_bytes(page.picture())
        assert not page.complaints


@needs_chromium
def test_text_of_the_model_stays_text_and_errors_are_told(served: Running, monkeypatch: pytest.MonkeyPatch):
    chunks = api_reply.ApiReply.chunks

    def with_markup(reply: api_reply.ApiReply, index: int, delta: Delta) -> Any:
        return chunks(reply, index, delta._replace(text=delta.text + EVIL))

    monkeypatch.setattr(api_reply.ApiReply, "chunks", with_markup)
    with open_page(served.url + "/") as page:
        answer(page, prompt="3 and 4 make", most=8)
        assert EVIL in page.evaluate("document.querySelector('#plain .answer').textContent")
        assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
        assert not page.complaints
        status = answer(page, prompt="3 and 4 make 7 " * 40)
        assert status.startswith("Failed: the prompt has ") and "at most" in status
        served.until_idle()


@needs_chromium
def test_a_reader_may_stop(served: Running, monkeypatch: pytest.MonkeyPatch):
    for lane in served.scheduler.lanes.values():
        step = lane.slots.step
        monkeypatch.setattr(lane.slots, "step", lambda step=step: (time.sleep(0.1), step())[1])
    with open_page(served.url + "/") as page:
        page.evaluate("document.getElementById('start').click(); 1")
        time.sleep(0.5)
        page.evaluate("document.getElementById('stop').click(); 1")
        deadline = time.monotonic() + 10
        while page.evaluate("document.getElementById('status').textContent") != "Stopped.":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        served.until_idle(5)
        assert not page.complaints
