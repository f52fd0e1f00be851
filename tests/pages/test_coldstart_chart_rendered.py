"""The cold-start chart in a real browser: nothing is written over anything else, and dark is dark."""

from __future__ import annotations

import itertools
import os
import pathlib
import sys
from collections.abc import Iterator

import pytest

from tests.pages.browser import CHROMIUM, Browser, browsing

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tools", "bench"))

import _coldstart_figure
from _coldstart_techniques import ROWS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="this machine lacks chromium")

WORDS = """[...document.querySelectorAll('text')].map(e => {
    const box = e.getBoundingClientRect();
    return {left: box.left, right: box.right, top: box.top, bottom: box.bottom, text: e.textContent};
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(str(tmp_path_factory.mktemp("profile"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A chart with every row there is, the longest of them as long as it can be."""
    phases = {"start Python": 4.0, "import torch": 12.0, "load weights": 10.0, "first token": 5.0}
    sample = {"total_s": 31.0, "phases": phases, "same": True, "inside": {}}
    other = {"total_s": 29.0, "phases": phases | {"first token": 3.0}, "same": True, "inside": {}}
    machine = {"boot": "one", "gpus": ["NVIDIA H100 80GB HBM3, driver 580.159.04"]}
    rows = [{"row": row, "samples": [sample, other, sample]} for row in ROWS]
    model = {"parameters": 7_000_000_000, "nbytes": 14_000_000_000}
    path = tmp_path_factory.mktemp("chart") / "coldstart.svg"
    path.write_text(_coldstart_figure.chart([{"model": model, "machine": machine, "rows": rows}]))
    return path.as_uri()


def test_no_word_is_on_another_and_all_are_on_the_paper(browser: Browser, page: str) -> None:
    browser.show(page, width=1000, scheme="light")
    words = browser.value(WORDS)
    assert len(words) > 3 * len(ROWS)
    paper = browser.value("document.documentElement.getBoundingClientRect().right")
    assert [one["text"] for one in words if one["left"] < 0 or one["right"] > paper] == []
    clashes = [
        (one["text"], other["text"])
        for one, other in itertools.combinations(words, 2)
        if one["left"] < other["right"]
        and other["left"] < one["right"]
        and one["top"] + 2 < other["bottom"]  # a line's box is higher than its letters
        and other["top"] + 2 < one["bottom"]
    ]
    assert clashes == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_viewers_setting(browser: Browser, page: str, scheme: str) -> None:
    browser.show(page, width=1000, scheme=scheme)
    fill = "getComputedStyle(document.querySelector('.{}')).fill"
    paper, ink = (browser.value(fill.format(name)) for name in ("paper", "title"))
    assert (paper, ink) == {
        "light": ("rgb(251, 250, 248)", "rgb(28, 27, 25)"),
        "dark": ("rgb(20, 21, 26)", "rgb(236, 235, 230)"),
    }[scheme]
    assert browser.requests == [page]


def test_it_is_painted_as_png_at_twice_its_size(page: str, tmp_path: pathlib.Path) -> None:
    drawn = pathlib.Path(page.removeprefix("file://")).read_text()
    path = tmp_path / "chart.png"
    assert _coldstart_figure.write_png(drawn, str(path))
    picture = path.read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture[16:20], "big") == 2000
