"""Several runs of the cold-start bench as one table: medians, ratios of named pairs, and what each technique holds.

Pure: documents in, text out. A ratio is taken within one machine's boot and is the median of those of all that have
both rows; where none has both it is that of all samples together, and marked with a tilde.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from _claims import ARTICLE, CLAIMS, MARK, OTHERS, Claim
from _coldstart_many import described
from _coldstart_techniques import TECHNIQUES

Runs = Sequence[Mapping[str, Any]]

BASE: Final = "none"
BEST: Final = ("released plain", "released", "restore plain", "restore unencrypted", "restore")
"""What counts as everything together: the first of these that was measured."""
_STAGES: Final = {
    "start": ("start Python", "import torch", "import transformers"),
    "command": (),
    "process": ("criu restore", "namespaces"),
    "memory": ("memory", "lay out"),
    "CUDA": ("cuda restore", "cuda unlock", "CUDA restore", "CUDA unlock"),
    "GPU": ("open the GPU",),
    "weights": ("load weights",),
    "token": ("first token", "ready"),
}
"""The phases of each stage; others are `command`, what the server does inside of its answer is `weights`."""
STAGES: Final = {
    "start": "Python starts and imports",
    "command": "restore command, checks",
    "process": "process (CRIU)",
    "memory": "memory filled",
    "CUDA": "GPU state (CUDA)",
    "GPU": "GPU opened",
    "weights": "weights",
    "token": "first token",
}
"""Stages in the order in which they go by, as the chart's legend has them."""
_ANSWER: Final = "answer a request"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the bench over all runs.

    Attributes:
        row: technique and state.
        totals_s: of all samples.
        phases: of the sample in the middle; they add up to its total.
        inside: of the same sample; what the server did while the last phase went by.
        same: every answer was that of the server before.
    """

    row: str
    totals_s: tuple[float, ...]
    phases: Mapping[str, float]
    inside: Mapping[str, float]
    same: bool

    @property
    def median_s(self) -> float:
        return statistics.median(self.totals_s)

    def cell(self) -> str:
        """Median, range and count."""
        if len(self.totals_s) == 1:
            return f"{seconds(self.median_s)} (one sample)"
        low, high = seconds(min(self.totals_s)), seconds(max(self.totals_s))
        return f"{seconds(self.median_s)} ({low} to {high}, {len(self.totals_s)})"


def seconds(value: float) -> str:
    """With as many digits as are of use."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def gigabytes(value: float | None) -> str:
    """Of 10^9 bytes; a dash for what is not known."""
    return "-" if value is None else "0" if value < 5e6 else f"{value / 1e9:.2f}"


def by_model(runs: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Runs by the number of their model's parameters, the smallest first."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for run in runs:
        found.setdefault(int(run["model"]["parameters"]), []).append(run)
    return dict(sorted(found.items()))


def lines(runs: Runs) -> dict[str, Line]:
    """All rows of these runs, joined by name."""
    samples: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        for row in run["rows"]:
            samples.setdefault(row["row"], []).extend(row["samples"])
    found = {}
    for row, ones in samples.items():
        middle = sorted(ones, key=lambda one: one["total_s"])[(len(ones) - 1) // 2]
        found[row] = Line(
            row=row,
            totals_s=tuple(float(one["total_s"]) for one in ones),
            phases=middle["phases"],
            inside=middle["inside"],
            same=all(one["same"] for one in ones),
        )
    return found


def ratio(runs: Runs, base: str, row: str) -> tuple[float, bool] | None:
    """How many times faster `row` is than `base`, and whether both are of one machine's boot; None without one."""
    boots: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        boots.setdefault(run["machine"]["boot"], []).append(run)
    paired = []
    for ones in boots.values():
        here = lines(ones)
        if base in here and row in here:
            paired.append(here[base].median_s / here[row].median_s)
    if paired:
        return statistics.median(paired), True
    everywhere = lines(runs)
    if base in everywhere and row in everywhere:
        return everywhere[base].median_s / everywhere[row].median_s, False
    return None


def times(found: tuple[float, bool] | None) -> str:
    """A ratio as text."""
    if found is None:
        return "-"
    value, paired = found
    return f"{'' if paired else '~'}{value:.3g}x"


def stages(line: Line) -> dict[str, float]:
    """A row's phases in the stages of the chart; what the server did inside of the answer is taken out of it."""
    named = {phase: stage for stage, phases in _STAGES.items() for phase in phases}
    found = dict.fromkeys(STAGES, 0.0)
    left = 0.0
    for phase, spent in line.phases.items():
        if phase == _ANSWER:
            left = spent
        else:
            found[named.get(phase, "command")] += spent
    for phase, spent in line.inside.items():
        if phase != "reading ahead" and not phase.endswith("before"):
            part = min(spent, max(0.0, left))
            found[named.get(phase, "weights")] += part
            left -= part
    found["token"] += left
    return {stage: max(0.0, spent) for stage, spent in found.items()}


def parameters(count: int) -> str:
    """3.6B."""
    return f"{count / 1e9:.1f}B" if count >= 1e8 else f"{count / 1e6:.0f}M"


def headline(runs: Runs) -> list[str]:
    """The best start, and each ratio with the pair that it is of."""
    found = lines(runs)
    best = next((name for name in BEST if f"{name} warm" in found), None)
    if best is None:
        return ["nothing was restored warm, so there is no headline"]
    fast = found[f"{best} warm"]
    said = [f"`{best} warm`: {seconds(fast.median_s)} s to the first token"]
    for state in ("cold", "warm"):
        slow = found.get(f"{BASE} {state}")
        if slow is not None:
            pair = f"{state}/warm: `{slow.row}` {seconds(slow.median_s)} s by `{fast.row}`"
            said.append(f"{times(ratio(runs, slow.row, fast.row))} ({pair})")
    return said


def table(runs: Runs) -> list[str]:
    """The main table, in Markdown."""
    found = lines(runs)
    head = [
        "technique", "cold, s", "warm, s", "cold/cold", "warm/warm", "cold/warm", "GPU idle, GB", "GPU serving, GB",
        "host idle, GB", "files in memory when warm, GB", "snapshot, GB",
        f"article: s ({MARK})", "article: snapshot, GB", "article: GPU held, GB",
    ]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for technique in TECHNIQUES:
        name = technique.name
        cold, warm = found.get(f"{name} cold"), found.get(f"{name} warm")
        if cold is None and warm is None:
            continue
        claim = CLAIMS.get(name)
        bad = any(one is not None and not one.same for one in (cold, warm))
        rows.append(
            [
                f"`{name}`: {technique.label}" + (" **OTHER ANSWERS**" if bad else ""),
                cold.cell() if cold else "-",
                warm.cell() if warm else "-",
                times(ratio(runs, f"{BASE} cold", f"{name} cold")),
                times(ratio(runs, f"{BASE} warm", f"{name} warm")),
                times(ratio(runs, f"{BASE} cold", f"{name} warm")),
                gigabytes(_held(runs, name, "idle", "gpu_bytes")),
                gigabytes(_held(runs, name, "serving", "gpu_bytes")),
                gigabytes(_held(runs, name, "idle", "host_bytes")),
                gigabytes(_last(run["warmed"].get(name) for run in runs)),
                gigabytes(_last(run["snapshots"].get(name, {}).get("stored") for run in runs)),
                *_claimed(claim),
            ]
        )
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def phases(runs: Runs) -> list[str]:
    """Every phase of the sample in the middle of each row, in Markdown."""
    out = ["| row | s | phases | the server, meanwhile |", "| --- | --- | --- | --- |"]
    for line in lines(runs).values():
        parts = ", ".join(f"{name} {spent:.2f}" for name, spent in line.phases.items() if spent >= 0.005)
        inside = ", ".join(f"{name} {spent:.2f}" for name, spent in line.inside.items()) or "-"
        out.append(f"| `{line.row}` | {seconds(sum(line.phases.values()))} | {parts} | {inside} |")
    return out


def others() -> list[str]:
    """What providers and peers say, in Markdown."""
    out = [f"| who | what | figure ({MARK}) |", "| --- | --- | --- |"]
    return out + [f"| {who} | {what} | {figure} |" for who, what, figure in OTHERS]


def where(runs: Runs) -> list[str]:
    """Machines and commands."""
    machines: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        it = run["machine"]
        gpus = ", ".join(it["gpus"]) or "no GPU"
        said = (
            f"{gpus}; {it['cores']} cores, kernel {it['kernel']}, CRIU {it['criu']}, Python {it['python']}, "
            f"huge pages {it['huge_pages']}"
        )
        machines.setdefault(said, []).append(run)
    out = []
    for said, ones in machines.items():
        boots = len({run["machine"]["boot"] for run in ones})
        out.append(f"- {said}; {len(ones)} run{'s'[: len(ones) > 1]} on {boots} machine{'s'[: boots > 1]}")
        out += [f"    `{run['command']}`" for run in ones]
    return out


def report(runs: Runs) -> list[str]:
    """All of one model, in Markdown."""
    model = runs[0]["model"]
    name, nbytes = parameters(model["parameters"]), model["nbytes"] / 1e9
    many = described([one for run in runs for one in run["many"]])
    many += ["", *(f"- `{row}` FAILED: {why}" for run in runs for row, why in run["failures"].items())]
    title = [f"## Cold start to first token: {name}, {nbytes:.1f} GB of weights", ""]
    if not lines(runs):
        return [*title, *many, "", *where(runs)]
    daemon = _last(run["mount_bytes"] for run in runs)
    return [
        *title,
        f"{'; '.join(headline(runs))}.",
        "",
        *table(runs),
        "",
        "Median (lowest to highest, samples). cold: nothing in memory; warm: everything that can be. Ratios are to "
        f"`{BASE}`, of the states named, within one machine's boot (~: of different ones). A process that is gone "
        f"holds 0; `suspend` stays. A mount's daemon holds {gigabytes(daemon)} GB of the host's. "
        f"Article: {ARTICLE}; it does not say what was in memory.",
        "",
        *phases(runs),
        "",
        *many,
        "",
        *where(runs),
    ]


def _held(runs: Runs, name: str, when: str, what: str) -> float | None:
    return _last(run["held"].get(name, {}).get(when, {}).get(what) for run in runs)


def _last(values: Iterable[float | None]) -> float | None:
    return next((one for one in reversed(list(values)) if one is not None), None)


def _claimed(claim: Claim | None) -> list[str]:
    if claim is None:
        return ["-", "-", "-"]
    return [f"{claim.seconds:g}", *(gigabytes(one) for one in (claim.snapshot_bytes, claim.gpu_bytes))]
