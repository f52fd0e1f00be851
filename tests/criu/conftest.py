"""What tests of CRIU share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.stopped import Stopped


@pytest.fixture
def images(tmp_path: Path) -> str:
    """An empty folder for images."""
    folder = tmp_path / "images"
    folder.mkdir(mode=0o700)
    return str(folder)


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Stopped]:
    made = Stopped(tmp_path)
    yield made
    made.close()


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(2 << 20))
    return str(path)
