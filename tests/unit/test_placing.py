"""Which source and state folder a model belongs to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weightfs import mounts
from weightfs.cli import placing
from weightfs.cli.placing import Home, home_below, home_of
from weightfs.config import default_state_dir
from weightfs.errors import BusyError
from weightfs.mounts import Mounted


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Mounts as the table would have them: one, one of a folder within its source, and one that records."""
    base = os.path.realpath(tmp_path)
    shown = [
        Mounted(f"{base}/models", f"{base}/srv", "0:1"),
        Mounted(f"{base}/inner", f"{base}/srv/inner", "0:2"),
        Mounted(f"{base}/weightfs-record-x/llama", f"{base}/srv/inner/llama", "0:3"),
        Mounted(f"{base}/dead", f"{base}/gone", "0:4"),
    ]
    answers = {
        f"{base}/models": {"control_socket": f"{base}/state/control-1.sock"},
        f"{base}/inner": {"control_socket": None},
    }
    monkeypatch.setattr(mounts, "mounted", lambda: shown)
    monkeypatch.setattr(placing, "status_of", lambda here: answers.get(here.mountpoint))
    return base


def test_a_folder_on_a_mount_or_in_its_source(base: str) -> None:
    assert home_of(f"{base}/models/a/b") == Home(f"{base}/srv", f"{base}/state", "a/b")
    assert home_of(f"{base}/srv/a/b") == Home(f"{base}/srv", f"{base}/state", "a/b")
    assert home_of(f"{base}/models") == Home(f"{base}/srv", f"{base}/state", "")
    assert home_of(f"{base}/models-2/a") is None
    found = home_of(f"{base}/models/a")
    assert found is not None
    assert found.path == f"{base}/srv/a"


def test_the_innermost_source_counts_but_none_that_records(base: str) -> None:
    inner = f"{base}/srv/inner"
    assert home_of(f"{inner}/llama") == Home(inner, default_state_dir(inner), "llama")


def test_a_mount_that_does_not_answer(base: str) -> None:
    with pytest.raises(BusyError, match="does not answer"):
        home_of(f"{base}/gone/a")


def test_a_source_that_is_named(base: str) -> None:
    assert home_below(base, f"{base}/x/y") == Home(base, default_state_dir(base), "x/y")
    assert home_below(f"{base}/x", f"{base}/y") is None
