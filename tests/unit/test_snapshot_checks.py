"""What doctor says of snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightfs.cli import snapshot_checks


def stand_in(folder: Path, version: str, check: str = "echo Looks good.") -> str:
    program = folder / "criu"
    program.write_text(f'#!/bin/sh\ncase $1 in --version) echo "Version: {version}" ;; check) {check} ;; esac\n')
    program.chmod(0o755)
    return str(program)


@pytest.fixture(autouse=True)
def _only_the_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("checkpoint.criu.BUNDLED", str(tmp_path / "bundled"))
    monkeypatch.setattr("weightfs.linux.kernel_version", lambda: (6, 18))


def test_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = snapshot_checks.criu()
    assert (found.state, found.mend, found.needed) == ("missing", "tools/install-criu", False)
    assert "not installed" in found.detail


@pytest.mark.parametrize(
    ("version", "kernel", "state"),
    [
        ("4.2.1", (6, 18), "ok"),
        ("4.1.1", (6, 18), "degraded"),
        ("4.1.1", (6, 15), "ok"),
        ("4.1", (6, 1), "ok"),
        ("3.17.1", (6, 1), "missing"),
        ("none", (6, 1), "missing"),
    ],
)
def test_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, kernel: tuple[int, int], state: str
) -> None:
    program = stand_in(tmp_path, version)
    monkeypatch.setattr("weightfs.linux.kernel_version", lambda: kernel)
    found = snapshot_checks.criu()
    assert found.state == state
    assert program in found.detail
    assert found.mend == (None if state == "ok" else "tools/install-criu")


def test_what_check_says_is_passed_on(tmp_path: Path) -> None:
    stand_in(tmp_path, "4.2.1", 'echo "Error (criu/cr-check.c:1): Ptrace is not permitted" >&2; exit 1')
    found = snapshot_checks.criu()
    assert found.state == "missing"
    assert "Ptrace is not permitted" in found.detail


def test_run() -> None:
    assert snapshot_checks.run_folder("/dev/shm").state == "ok"
    assert snapshot_checks.run_folder("/proc").state == "degraded"
    assert snapshot_checks.run_folder("/nowhere").state == "degraded"
