from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from typer.testing import CliRunner

from prefetch.timeline import Timeline
from tests.helpers.timelines import BLOCKS, MIB, STRANGE, cold_load, sample_document
from weightfs import mounts
from weightfs.cli import placing, waterfall
from weightfs.cli import timeline as command
from weightfs.cli.main import app


def cold() -> dict[str, Any]:
    timeline = Timeline(0.0)
    cold_load(timeline)
    load: dict[str, Any] = timeline.document()["loads"][0]
    return load


def test_arrivals_say_when_a_part_came() -> None:
    layers = waterfall.arrivals(cold())
    assert [one.label for one in layers] == ["embedding", *map(str, range(BLOCKS)), "norm", "head"]
    assert (layers[0].first_s, layers[0].last_s, layers[0].whole) == (0.001, 0.1, True)
    assert (layers[1].first_s, layers[1].last_s, layers[1].whole) == (0.1, 0.2, True)
    assert (layers[-1].before_bytes, layers[-1].first_s, layers[-1].last_s) == (64 * MIB, None, None)
    assert layers[-1].whole


def test_start_is_ready_with_embedding_and_first_block() -> None:
    assert waterfall.start_ready_s(cold()) == 0.2
    assert waterfall.start_ready_s({**cold(), "samples": []}) is None


def test_a_part_that_left_memory_again_did_come() -> None:
    timeline = Timeline(0.0)
    load = timeline.begin("llama", "warm", 0.0, [("0", 10)])
    for at_s, resident in enumerate((0, 5, 0)):
        load.sample(float(at_s), [resident])
    (one,) = waterfall.arrivals(timeline.document()["loads"][0])
    assert (one.first_s, one.last_s, one.whole) == (0.0, 1.0, False)


def test_page_is_well_formed_and_needs_nothing_else() -> None:
    text = waterfall.page(sample_document(), "/models")
    body = text.removeprefix("<!doctype html>\n")
    body = re.sub(r"<(meta [^>]*)>", r"<\1/>", body)  # the one void element there is
    root = ElementTree.fromstring(body)
    assert len(root.findall(".//section")) == 3
    assert not re.search(r"<script|<link|@import|url\(|https?:|src=|\son\w+=", text)
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text


def test_strange_names_stay_text() -> None:
    text = waterfall.page(sample_document(), '/mnt/"><b>')
    assert "<script" not in text
    assert "<b>" not in text
    assert "\x1b" not in text
    assert "llama&quot;&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;\\x1b[31m\\udcff" in text
    text.encode()


def test_what_was_not_observed_is_said_so() -> None:
    text = waterfall.page({"loads": [cold()]}, "/models")
    assert '<dt>First demand wait</dt><dd class="none">not observed</dd>' in text
    assert "waited</li>" not in text
    waited = waterfall.page({"loads": [sample_document()["loads"][1]]}, "/models")
    assert "<dt>First demand wait</dt><dd>0.40 s at 0.10 s</dd>" in waited
    assert "waited</li>" in waited


def test_every_drawing_has_a_title_and_a_description() -> None:
    body = waterfall.page(sample_document(), "/models")
    for drawing in re.findall(r'<svg role="img" aria-labelledby="(\S+) (\S+)"', body):
        for name in drawing:
            assert body.count(f'id="{name}"') == 1
    assert len(re.findall(r"<svg role", body)) == 4


def test_a_load_that_nobody_looked_at_has_no_plots() -> None:
    text = waterfall.page({"loads": [sample_document()["loads"][0]]}, "/models")
    assert "Nobody looked" in text
    assert "<svg" not in text


def test_page_of_no_loads() -> None:
    assert "Nothing was loaded yet" in waterfall.page({"loads": []}, "/models")


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    here = mounts.Mounted(mountpoint="/models", source="/srv", device="0:50")
    monkeypatch.setattr(command, "find", lambda _: here)
    monkeypatch.setattr(placing, "status_of", lambda _: {"control_socket": "/run/control"})

    def ask(path: str, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert (path, request) == ("/run/control", {"command": "timeline"})
        assert timeout_s > 0
        return sample_document()

    monkeypatch.setattr(command, "ask", ask)


@pytest.mark.usefixtures("answering")
def test_command_prints_text_json_or_writes_the_page(tmp_path: Any) -> None:
    run = CliRunner().invoke(app, ["timeline", "/models"])
    assert run.exit_code == 0, run.output
    assert "meta/llama-3-8b: 3.9 GiB" in run.stdout
    assert "read after 3.20 s" in run.stdout
    assert "\x1b" not in run.stdout
    told = json.loads(CliRunner().invoke(app, ["timeline", "/models", "--json"]).stdout)
    assert told["schema"] == 1
    assert [load["model"] for load in told["loads"]] == [STRANGE, "tiny", "meta/llama-3-8b"]
    page = tmp_path / "loads.html"
    run = CliRunner().invoke(app, ["timeline", "/models", "--html", str(page)])
    assert (run.exit_code, run.stdout) == (0, f"{page}: 3 loads\n")
    assert page.read_text() == waterfall.page(sample_document(), "/models")


@pytest.mark.usefixtures("answering")
def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Any) -> None:
    run = CliRunner().invoke(app, ["timeline", "/models", "--html", str(tmp_path)])
    assert run.exit_code == 1
    assert run.stderr == f"weightfs: {tmp_path}: can't be written: Is a directory\n"
