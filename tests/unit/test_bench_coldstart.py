"""The cold-start table and its chart: what is joined, which pairs ratios are of, how long bars are."""

from __future__ import annotations

import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tools", "bench"))

import _chart
import _claims
import _coldstart_figure
import _coldstart_many
import _coldstart_rows
import _coldstart_table as table
import _coldstart_techniques
from _coldstart_place import FailedError, Sample

SVG = "{http://www.w3.org/2000/svg}"
START = {"start Python": 1.0, "import torch": 5.0, "load weights": 3.0, "answer a request": 1.0}
BACK = {"start": 0.1, "criu restore": 0.1, "memory": 0.2, "cuda restore": 0.3, "answer a request": 0.3}


def run(
    rows: dict[str, list[float]], *, boot: str = "one", parameters: int = 7_000_000_000, **more: Any
) -> dict[str, Any]:
    def sample(total_s: float, phases: dict[str, float]) -> dict[str, Any]:
        scale = total_s / sum(phases.values())
        inside = {"map": 0.05 * scale, "copy": 0.2 * scale} if phases is BACK else {}
        return {"total_s": total_s, "phases": {k: v * scale for k, v in phases.items()}, "same": True, "inside": inside}

    return {
        "command": f"coldstart.py --rows {','.join(rows)}",
        "machine": {
            "boot": boot, "gpus": ["A <GPU>, driver 1"], "cores": 4, "kernel": "6", "criu": "4", "python": "3",
            "huge_pages": "madvise",
        },
        "model": {"parameters": parameters, "nbytes": 2 * parameters},
        "many": [],
        "failures": {},
        "mount_bytes": 40_000_000,
        "warmed": {"released plain": 16e9},
        "snapshots": {"released plain": {"stored": 1.8e9}},
        "held": {"none": {"serving": {"gpu_bytes": 15e9}, "idle": {"gpu_bytes": 0, "host_bytes": 0}}},
        "rows": [
            {"row": row, "samples": [sample(one, START if row.startswith("none") else BACK) for one in totals]}
            for row, totals in rows.items()
        ],
        **more,
    }  # fmt: skip


def test_rows_are_named_alone_or_by_their_technique() -> None:
    assert _coldstart_techniques.chosen("mount cold, none") == ["mount cold", "none cold", "none warm"]
    assert _coldstart_techniques.chosen("none,none warm") == ["none cold", "none warm"]
    for row in _coldstart_techniques.ROWS:
        technique, state = _coldstart_techniques.split(row)
        assert f"{technique.name} {state}" == row
    with pytest.raises(ValueError, match="mount hot"):
        _coldstart_techniques.chosen("none,mount hot")


def test_techniques_share_a_snapshot_only_if_it_is_made_alike() -> None:
    stored = {name: one.stored_as for name, one in _coldstart_techniques.BY_NAME.items() if one.snapshot is not None}
    assert stored["restore plain"] == stored["restore criu"]
    assert stored["released plain"] == stored["released criu"]
    others = ["restore plain", "restore", "restore unencrypted", "released plain", "released", "process"]
    assert len({stored[name] for name in others}) == len(others)


def test_samples_of_several_runs_are_joined_and_the_median_is_of_all() -> None:
    runs = [run({"none cold": [30.0]}), run({"none cold": [20.0, 40.0]}), run({"none warm": [10.0]})]
    found = table.lines(runs)
    assert found["none cold"].median_s == 30.0
    assert found["none cold"].cell() == "30.0 (20.0 to 40.0, 3)"
    assert sum(found["none cold"].phases.values()) == pytest.approx(30.0)
    assert found["none warm"].cell() == "10.0 (one sample)"


def test_a_ratio_is_of_one_machines_boot_where_any_has_both() -> None:
    fast, slow = run({"none cold": [20.0]}, boot="a"), run({"none cold": [30.0]}, boot="b")
    here = run({"released plain warm": [1.0]}, boot="b")
    assert table.ratio([fast, slow, here], "none cold", "released plain warm") == (30.0, True)
    assert table.ratio([fast, here], "none cold", "released plain warm") == (20.0, False)
    assert table.times((20.0, False)) == "~20x"
    assert table.ratio([here], "none cold", "released plain warm") is None


def test_the_headline_names_the_pair_of_each_ratio() -> None:
    said = table.headline([run({"none cold": [30.0], "none warm": [15.0], "released plain warm": [0.5]})])
    assert said == [
        "`released plain warm`: 0.50 s to the first token",
        "60x (cold/warm: `none cold` 30.0 s by `released plain warm`)",
        "30x (warm/warm: `none warm` 15.0 s by `released plain warm`)",
    ]


def test_the_table_has_every_column_and_marks_what_is_only_claimed() -> None:
    said = table.table([run({"none cold": [30.0], "released plain warm": [0.5]})])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in said]
    assert {len(row) for row in cells} == {14}
    none, best = dict(zip(cells[0], cells[2], strict=True)), dict(zip(cells[0], cells[3], strict=True))
    assert none["GPU idle, GB"] == "0"
    assert none["GPU serving, GB"] == "15.00"
    assert none[f"article: s ({_claims.MARK})"] == "15.2"
    assert best["files in memory when warm, GB"] == "16.00"
    assert (best["cold/warm"], best["cold/cold"], best["snapshot, GB"]) == ("60x", "-", "1.80")


def test_another_answer_is_never_silent() -> None:
    wrong = run({"none cold": [30.0]})
    wrong["rows"][0]["samples"][0]["same"] = False
    assert "OTHER ANSWERS" in "\n".join(table.table([wrong]))


def test_a_row_that_failed_is_told_and_not_tried_again() -> None:
    found, calls, told = _coldstart_rows.Measured(), [], list[str]()

    def tell(row: str, sample: Sample) -> Sample:
        told.append(row)
        return sample

    def broken() -> Sample:
        calls.append(1)
        raise FailedError("no GPU left")

    for _ in range(2):
        found.take("mount cold", broken, tell)
        found.take("none cold", lambda: Sample(1.0, {}, True), tell)
    assert (found.failures, len(calls)) == ({"mount cold": "no GPU left"}, 1)
    assert len(found.samples["none cold"]) == 2
    assert told == ["none cold"] * 2
    said = table.report([run({"none cold": [30.0]}, failures=found.failures)])
    assert "- `mount cold` FAILED: no GPU left" in said


def test_stages_add_up_and_a_reload_is_taken_out_of_the_answer() -> None:
    line = table.lines([run({"released plain warm": [1.0]})])["released plain warm"]
    stages = table.stages(line)
    assert sum(stages.values()) == pytest.approx(1.0)
    assert stages["weights"] == pytest.approx(0.25)
    assert stages["token"] == pytest.approx(0.05)
    assert set(stages) == set(table.STAGES)
    assert len(table.STAGES) == len(_chart.COLOURS)


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(one) for one in range(1, 101)]
    assert _coldstart_many.percentile(values, 0.99) == 99.0
    assert _coldstart_many.percentile(values, 0.5) == 50.0
    assert _coldstart_many.percentile([3.0, 1.0], 0.99) == 3.0
    assert _coldstart_many.percentile([3.0], 0.01) == 3.0


def test_many_restores_count_their_failures() -> None:
    good = {"technique": "released", "at_once": 1, "totals_s": [1.0, 2.0, 3.0], "all_s": None, "failures": []}
    bad = good | {"at_once": 4, "all_s": 9.0, "failures": ["port 7: status 75, busy"]}
    said = table.report([run({}, many=[good, bad])])
    assert "| `released`, 3 in a row | 3 | 2.00 | 3.00 | 3.00 | 0 |" in said
    assert "| `released`, 4 at once | 3 | 2.00 | 3.00 | 3.00 | 1: port 7: status 75, busy |" in said
    assert not [line for line in said if line.startswith("| technique")]


@pytest.fixture
def chart() -> ElementTree.Element:
    runs = [run({"none cold": [30.0, 28.0, 33.0], "none warm": [15.0], "released plain warm": [0.5]})]
    return ElementTree.fromstring(_coldstart_figure.chart(runs))


def texts(chart: ElementTree.Element, kind: str) -> list[str]:
    return ["".join(one.itertext()) for one in chart.iter(f"{SVG}text") if kind in one.get("class", "").split()]


def test_bars_are_as_long_as_their_figures(chart: ElementTree.Element) -> None:
    groups = [one for one in chart.iter(f"{SVG}g") if one.get("class") == "group"]
    assert len(groups) == 2
    widths = []
    for group in groups:
        rows: dict[str, float] = {}
        for rect in group.iter(f"{SVG}rect"):
            if re.fullmatch(r"s\d", rect.get("class", "")):
                rows[rect.get("y", "")] = rows.get(rect.get("y", ""), 0.0) + float(rect.get("width", "0"))
        widths += list(rows.values())
    cold, warm, best = widths
    assert cold / warm == pytest.approx(2.0, rel=0.01)
    assert cold / best == pytest.approx(60.0, rel=0.02)


def test_every_figure_is_text_and_what_is_claimed_says_so(chart: ElementTree.Element) -> None:
    values = texts(chart, "value")
    assert values == [
        "30.0 s", "15.0 s", "15.2 s, claimed, not reproduced", "0.50 s", "0.38 s, claimed, not reproduced",
    ]  # fmt: skip
    assert texts(chart, "state") == ["cold", "warm", "claimed", "warm", "claimed"]
    assert len([one for one in chart.iter(f"{SVG}rect") if one.get("class") == "claimed"]) == 2
    assert "A <GPU>" in " ".join(texts(chart, "soft"))


def test_the_chart_stands_alone_and_has_colours_for_dark(chart: ElementTree.Element) -> None:
    style = next(chart.iter(f"{SVG}style")).text or ""
    assert "prefers-color-scheme: dark" in style
    assert not [one for one in chart.iter() if one.tag in (f"{SVG}script", f"{SVG}image", f"{SVG}use")]
    title = next(chart.iter(f"{SVG}title"))
    assert (title.get("id"), title.text) == ("t", "Cold start to first token: 7.0B, 14.0 GB of weights")
    assert chart.get("role") == "img"


def test_nothing_leaves_the_paper(chart: ElementTree.Element) -> None:
    width, height = float(chart.get("width", "0")), float(chart.get("height", "0"))
    for one in chart.iter():
        if one.tag == f"{SVG}rect":
            x, y = float(one.get("x", "0")), float(one.get("y", "0"))
            assert x + float(one.get("width", "0")) <= width + 0.1
            assert y + float(one.get("height", "0")) <= height + 0.1
        elif one.tag == f"{SVG}text":
            room = width - float(one.get("x", "0"))
            if "end" not in one.get("class", "") and "middle" not in one.get("class", ""):
                assert len("".join(one.itertext())) * 7.0 <= room, "".join(one.itertext())


def test_labels_end_before_the_states_begin() -> None:
    assert all(len(one.label) * 7.0 + 16 < 330 - 40 for one in _coldstart_techniques.TECHNIQUES)


def test_both_colours_of_each_stage_stand_out_from_the_paper() -> None:
    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for pair in _chart.COLOURS:
        for colour, paper in zip(pair, ("#fbfaf8", "#14151a"), strict=True):
            high, low = sorted((light(colour), light(paper)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3.0, colour


def test_another_size_than_the_articles_has_no_claims_in_its_chart() -> None:
    small = _coldstart_figure.groups([run({"none cold": [30.0]}, parameters=3_600_000_000)])
    assert [bar.label for group in small for bar in group.bars] == ["cold"]
