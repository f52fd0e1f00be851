"""Weights that step aside are in no snapshot, and come back in every restore, from their file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="this machine lacks torch")
pytest.importorskip("safetensors", reason="this machine lacks safetensors")

from tests.helpers.mounting import Mounter, wait_until_settled
from tests.helpers.released_child import write_weights
from tests.helpers.released_life import Life
from tests.helpers.served import Commands
from tests.helpers.targets import needs_criu

pytestmark = needs_criu


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    made = Commands(tmp_path)
    made.env |= {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    yield made
    made.close()


def test_two_snapshots_in_one_life(commands: Commands, tmp_path: Path) -> None:
    path = str(tmp_path / "model.safetensors")
    nbytes = write_weights(path, "double", 400)
    life = Life(commands, tmp_path, "double", path)
    for told in (life.first(), life.second(), life.again()):
        assert told["same"]
        assert told["stayed"]
        assert told["away"] == 0
        assert nbytes <= told["used"] < nbytes + (64 << 10)
        assert told["file_bytes"] == told["nbytes"] == nbytes
    assert all(size["logical"] < nbytes for size in life.bytes)


def test_other_weights_are_refused_before_anything_is_done(
    commands: Commands, tmp_path: Path, mounter: Mounter
) -> None:
    source = tmp_path / "models"
    source.mkdir()
    path = source / "model.safetensors"
    write_weights(str(path), "double", 4)
    wait_until_settled(str(path))
    mount = mounter(str(source))
    life = Life(commands, tmp_path, "double", mount.path("model.safetensors"))
    commands.told("create", "first", command=life.command)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "model.safetensors" in commands.refused("restore", "first", code=4)["path"]
    path.write_bytes(content)
    told = life.restored("first")
    assert told["same"]
    assert told["stayed"]
    assert told["file_bytes"] == told["nbytes"]
