"""Whatever keeps a snapshot from being restored, the service runs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

PROGRAM = """
import errno, os, sys
from checkpoint.readiness import Readiness
from checkpoint.running import RunOptions, Surroundings, run
from checkpoint.store import Store

def tools():
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/proc/driver")

around = Surroundings(store=lambda: Store("nowhere"), tools=tools, say=print, ready=lambda: None)
command = [sys.executable, "-c", "raise SystemExit(7)"]
options = RunOptions(command=command, ready=Readiness(), strict="strict" in sys.argv)
sys.exit(run("service", options, around))
"""


@pytest.mark.parametrize("strict", [False, True])
def test_an_error_of_the_machine_is_a_cold_start(strict: bool) -> None:
    argv = [sys.executable, "-c", PROGRAM, *(["strict"] if strict else [])]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    said = f"it can't be restored here: {os.strerror(errno.EMFILE)}"
    if strict:
        assert done.returncode == 1
        assert said in done.stderr
    else:
        assert done.returncode == 7, done.stderr
        assert f"cold start: /proc/driver: {said}" in done.stdout
