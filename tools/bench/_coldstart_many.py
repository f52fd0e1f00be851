"""Many restores of one snapshot: one after the other, where none may fail, and several at once, beside each other."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from _coldstart_place import FailedError, Place, end, first_answer, free_port, make_warm
from _coldstart_rows import path_of, snapshot_argv, snapshot_attempt, store_of
from _coldstart_techniques import Technique

_RESTORE_S: Final = 240.0
_TOLD_EVERY: Final = 10


@dataclass
class Outcome:
    """Of restores of one technique's snapshot, all warm.

    Attributes:
        technique: its name.
        at_once: how many ran beside each other; 1 where one followed the other.
        totals_s: from the command to the answer, of those that succeeded.
        all_s: from the first command to the last answer, where several ran at once; else None.
        failures: of the others, in words.
    """

    technique: str
    at_once: int
    totals_s: list[float] = field(default_factory=list)
    all_s: float | None = None
    failures: list[str] = field(default_factory=list)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1)]


def in_a_row(place: Place, technique: Technique, count: int) -> Outcome:
    """Restore, ask, end; over and over. Goes on after a failure."""
    outcome = Outcome(technique.name, 1)
    make_warm(path_of(place, technique), store_of(place, technique))
    for number in range(1, count + 1):
        began = time.monotonic()
        status, said = snapshot_attempt(place, technique, "restore", *technique.restore)
        try:
            if status:
                outcome.failures.append(f"restore {number}: status {status}, {said.get('error')}")
            elif (why := _wrong(place, said["pid"], place.port)) is not None:
                outcome.failures.append(f"restore {number}: {why}")
            else:
                outcome.totals_s.append(time.monotonic() - began)
        finally:
            if "pid" in said:
                end(said["pid"])
        if number % _TOLD_EVERY == 0:
            print(f"restores in a row: {number}, {len(outcome.failures)} failures", file=sys.stderr, flush=True)
    return outcome


def at_once(place: Place, technique: Technique, count: int) -> Outcome:
    """As many at the same time, each in namespaces of its own and behind a port of its own."""
    outcome = Outcome(technique.name, count)
    make_warm(path_of(place, technique), store_of(place, technique))
    ports = [free_port() for _ in range(count)]
    pids: list[int] = []
    began = time.monotonic()

    def one(port: int) -> None:
        command = ("restore", *technique.restore, "--new-pidns", "--publish", f"{port}:{place.port}")
        argv = snapshot_argv(place, technique, *command)
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=_RESTORE_S, check=False
            )
        except subprocess.TimeoutExpired:
            outcome.failures.append(f"port {port}: not restored within {_RESTORE_S:g} s")
            return
        said: dict[str, Any] = json.loads(done.stdout or "{}")
        if "pid" in said:
            pids.append(said["pid"])
        if done.returncode:
            outcome.failures.append(f"port {port}: status {done.returncode}, {said.get('error')}")
        elif (why := _wrong(place, said["pid"], port)) is not None:
            outcome.failures.append(f"port {port}: {why}")
        else:
            outcome.totals_s.append(time.monotonic() - began)

    threads = [threading.Thread(target=one, args=(port,)) for port in ports]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    outcome.all_s = time.monotonic() - began
    for pid in pids:
        with suppress(ProcessLookupError):
            end(pid)
    print(f"at once: {count}, all after {outcome.all_s:.2f} s, failures {outcome.failures}", file=sys.stderr)
    return outcome


def described(outcomes: Sequence[dict[str, Any]]) -> list[str]:
    """What came of them, in Markdown."""
    if not outcomes:
        return []
    out = ["| restores, all warm | succeeded | p50, s | p99, s | slowest, s | failures |", "| --- " * 6 + "|"]
    for one in outcomes:
        totals, failed = one["totals_s"], one["failures"]
        what = f"{len(totals) + len(failed)} in a row" if one["all_s"] is None else f"{one['at_once']} at once"
        figures = ["-"] * 3
        if totals:
            of = (statistics.median(totals), percentile(totals, 0.99), max(totals))
            figures = [f"{value:.2f}" for value in of]
        said = f"{len(failed)}: {failed[0]}" if failed else "0"
        out.append(f"| `{one['technique']}`, {what} | {len(totals)} | {' | '.join(figures)} | {said} |")
    return out


def _wrong(place: Place, pid: int, port: int) -> str | None:
    """Why a restored server's answer is not that of the first; None if it is."""
    try:
        answer = first_answer(place, pid, port)
    except (FailedError, OSError, ValueError) as error:
        return f"no answer: {error!r}"
    return None if answer == place.answer else f"another answer: {answer}"
