"""Weights that step aside, on a real GPU: `tools/gpu/run tests/gpu/test_released.py -s` prints what it took."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="this machine lacks torch")
pytest.importorskip("safetensors", reason="this machine lacks safetensors")

from checkpoint.cuda_helper import absence
from tests.helpers.mounting import wait_until
from tests.helpers.released_life import Life
from tests.helpers.served import Commands
from tests.helpers.targets import end, needs_criu

LAYERS = 112
"""Of 32 MiB each: 3.8 GB."""
WEIGHTFS = [sys.executable, "-c", "from weightfs.cli.main import main; main()"]
SLACK_BYTES = 64 << 20


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """Path and size. Written by a process of its own, which takes its CUDA context with it."""
    if lacking := absence():
        pytest.skip(f"this machine lacks a GPU: {lacking}")
    path = str(tmp_path_factory.mktemp("weights") / "model.safetensors")
    program = (
        "import sys; from tests.helpers.released_child import write_weights;"
        "print(write_weights(sys.argv[1], 'cuda', int(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path, str(LAYERS)], check=True, stdout=subprocess.PIPE, timeout=100
    )
    return path, int(done.stdout)


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    made = Commands(tmp_path)
    made.program = WEIGHTFS
    yield made
    made.close()


def _holds(told: dict[str, Any], nbytes: int) -> None:
    print(json.dumps({name: round(seconds, 4) for name, seconds in told["phases"].items()}))
    assert told["same"]
    assert told["graph"], "a graph captured before replays"
    assert told["stayed"]
    assert not told["kept"]
    assert not told["elsewhere"]
    assert told["file_bytes"] == told["nbytes"] == nbytes
    assert told["used"] - told["away"] >= nbytes


def test_many_blocks_in_one_life_leak_nothing(weights: tuple[str, int], tmp_path: Path) -> None:
    path, nbytes = weights
    told = tmp_path / "told"
    argv = [sys.executable, "-m", "tests.helpers.released_child", str(told), "cuda", path]

    def ask() -> dict[str, Any]:
        told.unlink()
        os.kill(child.pid, signal.SIGUSR1)
        wait_until(told.exists, "the child tells something", timeout_s=60)
        document: dict[str, Any] = json.loads(told.read_text())
        return document

    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as child:
        try:
            wait_until(told.exists, "the child is warm", timeout_s=100)
            first = json.loads(told.read_text())
            _holds(first, nbytes)
            for _ in range(8):
                ask()
                last = ask()
                _holds(last, nbytes)
        finally:
            end(child.pid)
    assert last["used"] <= first["used"] + SLACK_BYTES
    assert last["away"] <= first["away"] + SLACK_BYTES


@needs_criu
def test_two_snapshots_in_one_life(weights: tuple[str, int], commands: Commands, tmp_path: Path) -> None:
    path, nbytes = weights
    life = Life(commands, tmp_path, "cuda", path)
    for step in (life.first, life.second, life.again):
        _holds(step(), nbytes)
    print(json.dumps(life.bytes))
    assert all(size["logical"] < nbytes for size in life.bytes)
