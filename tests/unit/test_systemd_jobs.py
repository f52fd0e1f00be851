"""What is asked of systemd."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.models import write
from weightfs import systemd


@pytest.mark.parametrize(
    ("said", "stops"),
    [
        ("7 weightfs.service stop running", True),
        ("7 weightfs.service restart running", False),
        ("7 weightfs@a.service stop running\n8 weightfs.service start waiting", False),
        ("", False),
    ],
)
def test_only_a_stop_job_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, stops: bool) -> None:
    os.chmod(write(f"{tmp_path}/systemctl", f"#!/bin/sh\necho '{said}'\n".encode()), 0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert systemd.is_stopping("weightfs.service") is stops


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 1\n", None], ids=["fails", "absent"])
def test_a_systemd_that_can_not_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None) -> None:
    """Then the mount goes: nobody would serve it."""
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        os.chmod(write(f"{tmp_path}/systemctl", script.encode()), 0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert systemd.is_stopping("weightfs.service")
