"""The cold-start table as a bar chart: SVG, and PNG where a Chromium is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from typing import Final

from _chart import Bar, Group, svg
from _claims import ARTICLE, CLAIMS, MARK
from _coldstart_table import STAGES, Line, Runs, headline, lines, parameters, seconds, stages
from _coldstart_techniques import TECHNIQUES

CHROMIUM: Final = shutil.which("chromium") or shutil.which("google-chrome")
_ARTICLES_SIZE: Final = range(6_000_000_000, 8_500_000_000)
"""Parameters: only a model of this size has the article's figures beside it in the chart."""
_PAINT_S: Final = 60


def groups(runs: Runs) -> list[Group]:
    """A group for each technique that was measured, its states from cold to warm, then what is claimed of it."""
    found = lines(runs)
    claims = CLAIMS if runs[0]["model"]["parameters"] in _ARTICLES_SIZE else {}
    made = []
    for technique in TECHNIQUES:
        rows = [found[row] for state in technique.states if (row := f"{technique.name} {state}") in found]
        bars = [_bar(line, line.row.rpartition(" ")[2]) for line in rows]
        if bars and technique.name in claims:
            claimed = claims[technique.name].seconds
            bars.append(Bar(label="claimed", total=claimed, text=f"{claimed:g} s, {MARK}", low=claimed, high=claimed))
        if bars:
            made.append(Group(label=technique.label, bars=bars))
    return made


def chart(runs: Runs) -> str:
    """The SVG of one model's runs."""
    model = runs[0]["model"]
    gpus = sorted({gpu.partition(", driver")[0] for run in runs for gpu in run["machine"]["gpus"]}) or ["no GPU"]
    title = f"Cold start to first token: {parameters(model['parameters'])}, {model['nbytes'] / 1e9:.1f} GB of weights"
    notes = [
        *(said.replace("`", "") for said in headline(runs)),
        f"{', '.join(gpus)}. Medians; lines: range of the samples. cold: nothing in memory; warm: all that can be.",
    ]
    if model["parameters"] in _ARTICLES_SIZE:
        notes.append(f"Dashed: {ARTICLE}, {MARK}.")
    return svg(title, notes, STAGES, groups(runs))


def write_png(drawn: str, path: str) -> bool:
    """Paint an SVG as PNG at twice its size, in light; False where there is no Chromium.

    Raises:
        SystemExit: Chromium made none.
    """
    if CHROMIUM is None:
        return False
    size = re.search(r'width="(\d+)" height="(\d+)" role', drawn)
    assert size is not None, "not one of ours"
    with tempfile.TemporaryDirectory() as folder:
        page = os.path.join(folder, "chart.html")
        with open(page, "w", encoding="utf-8") as file:
            file.write(f"<!doctype html><meta charset=utf-8><style>body{{margin:0}}</style>{drawn}")
        argv = [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", "--no-first-run", f"--user-data-dir={folder}/profile",
            f"--screenshot={os.path.abspath(path)}", f"--window-size={size[1]},{size[2]}",
            "--force-device-scale-factor=2", f"file://{page}",
        ]  # fmt: skip
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PAINT_S, check=False)
        if done.returncode or not os.path.exists(path):
            raise SystemExit(f"Chromium painted nothing: {done.stderr.decode(errors='replace')[-500:]}")
    return True


def _bar(line: Line, label: str) -> Bar:
    return Bar(
        label=label,
        segments=stages(line),
        total=sum(stages(line).values()),
        text=f"{seconds(line.median_s)} s",
        low=min(line.totals_s),
        high=max(line.totals_s),
    )
