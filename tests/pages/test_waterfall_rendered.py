"""The page in a real browser: what is drawn where, in which colours, on a phone and on a desk."""

from __future__ import annotations

import base64
import itertools
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.timelines import BLOCKS, sample_document
from tests.pages.browser import CHROMIUM, Browser, browsing
from weightfs.cli import waterfall

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="this machine lacks chromium")

BOXES = """(selector) => [...document.querySelectorAll(selector)].map(e => {
    const box = e.getBoundingClientRect();
    return {left: box.left, right: box.right, top: box.top + scrollY, bottom: box.bottom + scrollY,
            title: e.querySelector('title')?.textContent ?? e.textContent};
})"""

CONTRASTS = """(() => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => parts(colour).slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = e => {
        for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (parts(colour)[3] !== 0) return colour;
        }
    };
    const found = [];
    for (const details of document.querySelectorAll('details')) details.open = true;
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const e = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || e.closest('svg')) continue;
        const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
        found.push([(a + 0.05) / (b + 0.05), walker.currentNode.textContent]);
    }
    return found;
})()"""

PIXELS = """(async (picture, places) => {
    const image = new Image();
    image.src = 'data:image/png;base64,' + picture;
    await image.decode();
    const canvas = document.createElement('canvas');
    canvas.width = image.width; canvas.height = image.height;
    const pen = canvas.getContext('2d');
    pen.drawImage(image, 0, 0);
    return places.map(([x, y]) => [...pen.getImageData(Math.round(x), Math.round(y), 1, 1).data].slice(0, 3));
})"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("page") / "loads.html"
    path.write_text(waterfall.page(sample_document(), "/models"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(str(tmp_path_factory.mktemp("profile"))) as one:
        yield one


def boxes(browser: Browser, selector: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = browser.value(f"({BOXES})({selector!r})")
    return found


@pytest.fixture(params=[(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")], ids=lambda p: f"{p[0]}-{p[1]}")
def shown(request: pytest.FixtureRequest, browser: Browser, page: pathlib.Path) -> tuple[Browser, int, str]:
    width, scheme = request.param
    browser.show(page.as_uri(), width=width, scheme=scheme)
    return browser, width, scheme


def test_nothing_is_fetched_and_nothing_runs(shown: tuple[Browser, int, str], page: pathlib.Path) -> None:
    browser, _, _ = shown
    assert browser.requests == [page.as_uri()]
    assert browser.value("document.scripts.length") == 0


def test_page_scrolls_down_only(shown: tuple[Browser, int, str]) -> None:
    browser, width, _ = shown
    assert browser.value("innerWidth") == width
    browser.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= width
    for one in boxes(browser, "h1, h2, p, dd, li, td, .plot, .plot > svg"):
        assert 0 <= one["left"] <= one["right"] <= width, one
    assert (
        browser.value(
            "Math.min(...[...document.querySelectorAll('main *')].filter(e => e.textContent.trim())"
            ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
        )
        >= 11
    )


def test_bars_stand_where_their_parts_came(shown: tuple[Browser, int, str]) -> None:
    browser, _, _ = shown
    (plot,) = boxes(browser, "#load-0 .waterfall .plot > svg")
    bars = boxes(browser, "#load-0 .waterfall rect.layer")
    assert len(bars) == BLOCKS + 3
    assert bars[0]["title"] == "embedding: 64.0 MiB, 1.0 ms to 0.10 s"
    wide = plot["right"] - plot["left"]
    for number, bar in enumerate(bars[1:-2], 1):  # block by block, each 0.1 s of 3.2 s, one below the other
        assert bar["left"] - plot["left"] == pytest.approx(0.1 * number / 3.2 * wide, abs=1.5)
        assert bar["right"] - bar["left"] == pytest.approx(0.1 / 3.2 * wide, abs=1.5)
        assert bar["top"] == pytest.approx(bars[number - 1]["top"] + 18, abs=0.6)
    labels = boxes(browser, "#load-0 .waterfall li")
    assert [one["title"] for one in labels[:4]] == ["opens", "first read", "embedding", "0"]
    for label, bar in zip(labels[2:], bars, strict=True):  # a label is on the line of its bar, left of it
        assert label["top"] - 1 < (bar["top"] + bar["bottom"]) / 2 < label["bottom"] + 1
        assert label["right"] <= plot["left"]
    events = boxes(browser, "#load-0 .waterfall circle.event")
    assert [one["title"] for one in events] == [
        "config.json opened at 0.0 ms",
        "model-00001-of-00002.safetensors opened at 1.20 s",
        "model-00002-of-00002.safetensors opened at 2.00 s",
        "first read submitted at 4.0 ms",
    ]
    middle = (events[1]["left"] + events[1]["right"]) / 2
    assert middle - plot["left"] == pytest.approx(1.2 / 3.2 * wide, abs=1.5)


def test_times_stand_under_their_lines(shown: tuple[Browser, int, str]) -> None:
    browser, _, _ = shown
    lines = boxes(browser, "#load-0 .waterfall line.grid")
    times = boxes(browser, "#load-0 .waterfall .ticks span")
    assert [one["title"] for one in times] == ["0", "0.80 s", "1.60 s", "2.40 s", "3.20 s"]
    for line, time in zip(lines[1:], times[1:], strict=False):
        assert (time["left"] + time["right"]) / 2 == pytest.approx(line["left"], abs=1.5)
    for one, other in itertools.pairwise(times):
        assert one["right"] < other["left"]


def test_text_can_be_read(shown: tuple[Browser, int, str]) -> None:
    browser, _, _ = shown
    found = browser.value(CONTRASTS)
    assert len(found) > 200  # the tables are opened for it
    assert min(found)[0] >= 4.5, min(found)


def test_screenshot_shows_bars_and_bytes(shown: tuple[Browser, int, str], tmp_path: pathlib.Path) -> None:
    browser, width, scheme = shown
    picture = browser.screenshot()
    data = base64.b64decode(picture)
    (tmp_path / f"{width}-{scheme}.png").write_bytes(data)  # kept with a failure
    drawn_width, drawn_height = struct.unpack(">II", data[16:24])
    assert drawn_width == width
    assert drawn_height >= browser.value("document.documentElement.scrollHeight") - 1
    bars = boxes(browser, "#load-0 .waterfall rect.layer")[:-1]
    (plot,) = boxes(browser, "#load-0 .area .plot > svg")
    high = plot["bottom"] - plot["top"]
    places = [((one["left"] + one["right"]) / 2, (one["top"] + one["bottom"]) / 2) for one in bars]
    places += [(plot["right"] - 3, plot["bottom"] - high / 2), (plot["left"] + 3, plot["top"] + high / 4), (2, 2)]
    *of_bars, full, empty, paper = browser.value(f"({PIXELS})({picture!r}, {[list(place) for place in places]!r})")
    dark = scheme == "dark"
    assert (max(paper) < 60) is dark
    assert (max(empty) < 60) is dark  # early on, nothing was there
    for colour in (*of_bars, full):
        assert max(colour) - min(colour) > 40, colour  # a colour, no grey
    assert of_bars[0] != of_bars[-1]
    assert len({tuple(colour) for colour in of_bars}) > BLOCKS // 2


def test_a_strange_name_is_text(shown: tuple[Browser, int, str]) -> None:
    browser, _, _ = shown
    name = browser.value("document.querySelector('#load-2 h2').textContent")
    assert name == 'llama"><script>alert(1)</script>&\\x1b[31m\\udcff'
