"""What benchmarks of snapshots share: a process that says when it is ready, the commands, and the way they run."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from _harness import MIB, WEIGHTFS, Report, mounted, parser, workplace, write_file

_STARTED_S: Final = 300


def begun(program: str, arguments: Sequence[object], place: str, log: str) -> subprocess.Popen[bytes]:
    """Start a Python program, and wait until it has made the file that its last argument names.

    Args:
        program: its text.
        arguments: all but the last one.
        place: a folder for that file.
        log: takes what it writes.
    """
    ready = os.path.join(place, "ready")
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments), ready],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    until = time.monotonic() + _STARTED_S
    while not os.path.exists(ready):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise SystemExit(f"the process is not ready: see {log}")
        time.sleep(0.01)
    os.unlink(ready)
    return process


def new_key(place: str) -> list[str]:
    """Make a key; gives the options that name it."""
    path = os.path.join(place, "key")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(os.urandom(32))
    return ["--key-file", path]


def start(place: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start `weightfs snapshot`, as a user would who has used it before: its bytecode is there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = os.path.join(place, "bytecode")
    return subprocess.Popen(
        [WEIGHTFS, "snapshot", arguments[0], "--json", *arguments[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finished(command: subprocess.Popen[str]) -> dict[str, Any]:
    """The document of a command, once it is done."""
    out, said = command.communicate()
    if command.returncode:
        raise SystemExit(f"{command.args!r}: status {command.returncode}: {said}")
    document: dict[str, Any] = json.loads(out)
    return document


def call(place: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The document of a command, with the seconds that it `took` as its caller sees it."""
    started = time.perf_counter()
    document = finished(start(place, arguments))
    return {**document, "took": time.perf_counter() - started}


def run(
    name: str,
    description: str,
    measure: Callable[[Report, argparse.Namespace, str, str], None],
    *,
    size: int,
    heap: int = 300,
    options: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> None:
    """Run a benchmark.

    Args:
        name: of the script.
        description: of it.
        measure: gets the report, the options, a folder, and the path of a file of weights on a mount.
        size, heap: of the weights, and of the process beside them, in MiB, unless told.
        options: adds more of them.
    """
    known = parser(description)
    known.set_defaults(size=size)
    known.add_argument("--heap", type=int, default=heap, metavar="MIB", help=f"besides weights (default {heap} MiB)")
    options(known)
    given = known.parse_args()
    if os.geteuid():
        raise SystemExit("snapshots need root")
    report = Report(name, given)
    with workplace(given.folder) as place:
        source = os.path.join(place, "source")
        os.mkdir(source)
        write_file(os.path.join(source, "weights.bin"), given.size * MIB)
        with mounted(source, place) as mount:
            report.describe(mount)
            measure(report, given, place, os.path.join(mount.path, "weights.bin"))
    report.finish()
