"""What tests of CRIU share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def images(tmp_path: Path) -> str:
    """An empty folder for images."""
    folder = tmp_path / "images"
    folder.mkdir(mode=0o700)
    return str(folder)
