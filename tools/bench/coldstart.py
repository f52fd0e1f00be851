"""From "start this model" to its first token, by each technique alone and together, cold and warm, phase by phase.

    tools/gpu/run tools/bench/coldstart.py --rows "none,restore plain" --json FILE      on the GPU machine: 7.2 GB
    tools/gpu/run tools/bench/coldstart.py --rows "" --restores 100 --at-once 1,4,8     many restores of one snapshot
    python tools/bench/coldstart.py --merge FILE... --figures tools/bench/figures       one table and chart of several
    python tools/bench/coldstart.py --device cpu --gigabytes 0.05 --rows none,mount     a trial anywhere, as root

A row is a technique, or one in a state, as `mount cold`; `_coldstart_techniques.py` has all of them. `cold`: nothing in
memory, neither weights nor images nor Python's libraries; `warm`: everything that can be. The server is an unmodified
one (`_plain_server.py`), but in the rows named `process` and `released`.

Every sample ends when the client has the answer to a request, which must be the answer the server gave before. What
the phases of a row leave unaccounted is a phase of its own. Caches are dropped for the whole machine: needs root.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any, Final

from _coldstart_figure import chart, write_png
from _coldstart_many import Outcome, at_once, in_a_row
from _coldstart_place import (
    HERE,
    Place,
    Sample,
    criu_version,
    free_port,
    gpu_bytes_in_use,
    host_bytes,
    huge_pages,
    mounted,
)
from _coldstart_rows import Measured, measure, snapshot, started
from _coldstart_table import by_model, others, parameters, report
from _coldstart_techniques import BY_NAME, ROWS, Technique, chosen

from checkpoint.cuda_helper import Cuda

SCHEMA: Final = 1
USUAL: Final = "none,mount,mount+prefetch,suspend,restore plain,restore,released plain,released"
SNAPSHOTS: Final = tuple(name for name, one in BY_NAME.items() if one.snapshot is not None)
_SUBREAPER: Final = 36  # PR_SET_CHILD_SUBREAPER: what CRIU restores is ours to wait for


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gigabytes", type=float, default=7.2, help="size of the weights (default 7.2)")
    options.add_argument("--device", default="cuda", help="where the model runs: cuda or cpu")
    options.add_argument("--rows", default=USUAL, help=f"which, separated by commas, of {', '.join(ROWS)}")
    options.add_argument("--rounds", type=int, default=3, help="samples of each warm row (default 3)")
    options.add_argument("--cold-rounds", type=int, default=1, help="samples of each cold row (default 1)")
    options.add_argument(
        "--within", type=float, default=None, metavar="S", help="begin no sample after so many seconds"
    )
    options.add_argument("--restores", type=int, default=0, metavar="N", help="then so many in a row")
    options.add_argument("--at-once", default="", metavar="N,N...", help="then so many beside each other")
    options.add_argument("--of", default="released plain", choices=SNAPSHOTS, help="which technique these restore")
    options.add_argument("--folder", default=None, help="where model and images go (default: a temp folder)")
    options.add_argument("--keep", default=None, metavar="FOLDER", help="or here, where they stay for the next run")
    options.add_argument("--thp", choices=("always", "madvise", "never"), help="huge pages, for the while")
    options.add_argument(
        "--merge", nargs="+", default=(), metavar="FILE", help="measure nothing: join these, of --json"
    )
    options.add_argument("--json", default=None, metavar="FILE", help="write everything there, each sample included")
    options.add_argument("--markdown", default=None, metavar="FILE", help="write the tables there as well")
    options.add_argument("--figures", default=None, metavar="FOLDER", help="write a chart of each model there")
    given = options.parse_args()
    try:
        rows = chosen(given.rows) if given.rows else []
        given.at_once = [int(part) for part in given.at_once.split(",") if part]
    except ValueError as error:
        options.error(f"no such row, or no number: {error}")
    runs = [one for path in given.merge for one in read(path)] or [run(given, rows)]
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"schema": SCHEMA, "runs": runs}, file, indent=1)
    models = by_model(runs)
    text = "\n".join([line for ones in models.values() for line in (*report(ones), "")] + others())
    print(text)
    if given.markdown:
        with open(given.markdown, "w", encoding="utf-8") as file:
            file.write(f"{text}\n")
    if given.figures:
        os.makedirs(given.figures, exist_ok=True)
        for count, ones in models.items():
            draw(chart(ones), os.path.join(given.figures, f"coldstart-{parameters(count)}"))
    if not given.merge and (runs[0]["failures"] or any(one["failures"] for one in runs[0]["many"])):
        sys.exit(1)


def read(path: str) -> list[dict[str, Any]]:
    """The runs in a file of `--json`."""
    with open(path, encoding="utf-8") as file:
        document = json.load(file)
    if document.get("schema") != SCHEMA:
        raise SystemExit(f"{path}: is no document of this bench's schema {SCHEMA}")
    found: list[dict[str, Any]] = document["runs"]
    return found


def draw(drawn: str, stem: str) -> None:
    """Write a chart as SVG and, where that is possible, PNG."""
    with open(f"{stem}.svg", "w", encoding="utf-8") as file:
        file.write(drawn)
    painted = write_png(drawn, f"{stem}.png")
    print(f"{stem}.svg" + (f", {stem}.png" if painted else "; no PNG: no Chromium here"), file=sys.stderr)


def run(given: argparse.Namespace, rows: list[str]) -> dict[str, Any]:
    """Measure on this machine."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what was mounted is unmounted
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    baseline = gpu_bytes_in_use()
    with ExitStack() as stack:
        policy = stack.enter_context(huge_pages(given.thp))
        folder = given.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="coldstart-", dir=given.folder))
        model = os.path.join(folder, "model")
        about = make_model(model, given.gigabytes, given.device)
        print(f"model: {about}", file=sys.stderr)
        mount, still = os.path.join(folder, "mount"), os.path.join(folder, "still")
        pids = stack.enter_context(mounted(model, mount, os.path.join(folder, "state")))
        if any(BY_NAME[row.rpartition(" ")[0]].source == "still" for row in rows):
            stack.enter_context(mounted(model, still, os.path.join(folder, "state-still"), "--prefetch", "off"))
        place = Place(folder, model, mount, still, given.device, free_port(), baseline)
        place.recall()
        until = None if given.within is None else began + given.within
        found = measure(place, rows, given.rounds, given.cold_rounds, told, until) if rows else Measured()
        outcomes = many(place, BY_NAME[given.of], given.restores, given.at_once, found)
        mount_bytes = host_bytes(pids)
    return {
        "command": shlex.join(["tools/bench/coldstart.py", *sys.argv[1:]]),
        "machine": machine() | {"huge_pages": policy},
        "model": about,
        "snapshots": {name: place.snapshots[BY_NAME[name].stored_as] for name in BY_NAME if _stored(place, name)},
        "mount_bytes": mount_bytes,
        "warmed": place.warmed,
        "held": {name: {when: asdict(one) for when, one in of.items()} for name, of in place.held.items()},
        "failures": found.failures,
        "many": [asdict(one) for one in outcomes],
        "rows": [{"row": name, "samples": [asdict(one) for one in ones]} for name, ones in found.samples.items()],
    }


def many(place: Place, technique: Technique, restores: int, counts: list[int], found: Measured) -> list[Outcome]:
    """What is asked for of many restores; a snapshot that they need and that can't be made is a failure of `found`."""
    if not restores and not counts:
        return []
    if place.answer is None:
        told("(first of all)", started(place, BY_NAME["none"], "warm"))
    if technique.stored_as not in place.snapshots:
        found.take(f"(snapshot for {technique.name})", partial(snapshot, place, technique), told)
    if technique.stored_as not in place.snapshots:
        return []
    row = [in_a_row(place, technique, restores)] if restores else []
    return row + [at_once(place, technique, count) for count in counts]


def _stored(place: Place, name: str) -> bool:
    technique = BY_NAME[name]
    return technique.snapshot is not None and technique.stored_as in place.snapshots


def make_model(folder: str, gigabytes: float, device: str) -> dict[str, Any]:
    """A model of random weights, unless it is there; says its size.

    Raises:
        SystemExit: the one that is there is of another size.
    """
    known = f"{folder}.json"
    if os.path.exists(known):
        with open(known, encoding="utf-8") as file:
            kept: dict[str, Any] = json.load(file)
        if kept["gigabytes"] != gigabytes:
            raise SystemExit(f"{folder}: is of {kept['gigabytes']} GB: name another --keep, or --gigabytes")
        return kept
    argv = [sys.executable, os.path.join(HERE, "_random_llama.py"), folder, str(gigabytes), device]
    made = subprocess.run(argv, check=True, stdout=subprocess.PIPE)
    about: dict[str, Any] = json.loads(made.stdout.splitlines()[-1]) | {"gigabytes": gigabytes}
    with open(known, "w", encoding="utf-8") as file:
        json.dump(about, file)
    return about


def machine() -> dict[str, Any]:
    """Where this runs."""
    cuda = Cuda.detect()
    gpus = []
    if cuda is not None:
        with cuda:
            gpus = [f"{one.name}, driver {cuda.version()}" for one in cuda.devices()]
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return {
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "criu": criu_version(),
        "gpus": gpus,
        "boot": boot,
    }


def told(name: str, sample: Sample) -> Sample:
    """Say it at once: a run that is cut off has said what it has."""
    parts = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in sample.phases.items())
    inside = "".join(f"; {phase} {seconds:.3f}" for phase, seconds in sample.inside.items())
    other = "" if sample.same else " OTHER ANSWER"
    print(f"{name}: {sample.total_s:.3f} s{other} ({parts}{inside})", file=sys.stderr)
    return sample


if __name__ == "__main__":
    main()
