"""Unit tests wait for no clock."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.unit.support import Later
from weightfs import library
from weightfs.index import store
from weightfs.index.store import IndexStore


@pytest.fixture(autouse=True)
def _prompt_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index's writer waits a moment for more to write; `close` waits for it."""
    monkeypatch.setattr(store, "_QUIET_S", 0.001)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Later:
    """Files count as unchanged for long, and what was found a moment ago is asked for again when a test says so."""
    clock = Later()
    monkeypatch.setattr(library, "time", clock)
    return clock


@pytest.fixture
def state(tmp_path: os.PathLike[str]) -> str:
    return os.path.join(tmp_path, "state")


@pytest.fixture
def index(state: str) -> Iterator[IndexStore]:
    opened = IndexStore(state, "source")
    yield opened
    opened.close()
