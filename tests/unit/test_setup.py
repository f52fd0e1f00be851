"""`weightfs setup`, into a root directory of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.mounting import WEIGHTFS, weightfs
from weightfs.cli.setup import UNITS, unit_text
from weightfs.errors import UnfitError

CHECKOUT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    " " in WEIGHTFS, reason="this machine lacks a checkout whose path a systemd unit can name: it has a space"
)
HELPER = os.path.join(os.path.dirname(WEIGHTFS), "mount.weightfs")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with systemd and some state."""
    for folder in ("sbin", "run/systemd/system", "etc/systemd/system", "var/lib/weightfs/models-1234"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "var/lib/weightfs/models-1234/index").write_text("index")
    return tmp_path


def run(root: Path, *options: str) -> list[tuple[str, str]]:
    done = weightfs("setup", "--root", str(root), "--json", *options)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    steps: list[dict[str, Any]] = document["steps"]
    said = [line.split()[:2] for line in done.stderr.splitlines() if "does not run here" not in line]
    assert [[step["action"], step["target"].split()[0]] for step in steps] == said
    return [(step["action"], step["target"].removeprefix(str(root))) for step in steps]


def everything(root: Path) -> dict[str, str]:
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            what = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else "folder"
            found[str(path.relative_to(root))] = what
    return found


INSTALLED = [*(f"/etc/systemd/system/{name}" for name in UNITS), "/sbin/mount.weightfs"]


def test_it_installs_and_is_done(root: Path) -> None:
    assert run(root) == [("write", INSTALLED[0]), ("write", INSTALLED[1]), ("link", INSTALLED[2])]
    for name in UNITS:
        path = root / "etc/systemd/system" / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        programs = re.findall(r"^Exec\w+=-?(\S+) ", path.read_text(), re.MULTILINE)
        assert set(programs) == {WEIGHTFS}
    assert os.readlink(root / "sbin/mount.weightfs") == HELPER
    assert os.access(root / "sbin/mount.weightfs", os.X_OK)
    after = everything(root)
    assert run(root) == [("unchanged", path) for path in INSTALLED]
    assert everything(root) == after


def test_removing_leaves_what_was_there_before(root: Path) -> None:
    before = everything(root)
    run(root)
    assert run(root, "--remove") == [*(("remove", path) for path in INSTALLED), ("keep", "/var/lib/weightfs")]
    assert everything(root) == before
    assert run(root, "--remove") == [("keep", "/var/lib/weightfs")]


def test_purge_takes_the_state_too(root: Path) -> None:
    run(root)
    assert run(root, "--remove", "--purge")[-1] == ("remove", "/var/lib/weightfs")
    assert not (root / "var/lib/weightfs").exists()
    assert run(root, "--remove", "--purge") == []


@pytest.mark.parametrize("options", [[], ["--remove"], ["--remove", "--purge"]])
def test_a_dry_run_changes_nothing(root: Path, options: list[str]) -> None:
    if options:
        run(root)
    before = everything(root)
    planned = run(root, *options, "--dry-run")
    assert everything(root) == before
    assert run(root, *options) == planned


def test_what_was_edited_is_kept_and_named(root: Path) -> None:
    run(root)
    edited = root / "etc/systemd/system/weightfs.service"
    edited.write_text(edited.read_text().replace("/srv/weights", "/srv/mine"))
    helper = root / "sbin/mount.weightfs"
    helper.unlink()
    helper.write_text("#!/bin/sh\n")
    before = everything(root)
    assert run(root) == [("keep", INSTALLED[0]), ("unchanged", INSTALLED[1]), ("keep", INSTALLED[2])]
    assert everything(root) == before
    steps = run(root, "--remove")
    assert steps[:3] == [("keep", INSTALLED[0]), ("remove", INSTALLED[1]), ("keep", INSTALLED[2])]
    assert edited.exists()
    assert helper.exists()


def test_another_installations_units_are_brought_up_to_date_and_removed(root: Path) -> None:
    for name in UNITS:
        (root / "etc/systemd/system" / name).write_text(unit_text(name, "/opt/older/bin/weightfs"))
    (root / "sbin/mount.weightfs").symlink_to("/opt/older/bin/mount.weightfs")
    assert run(root, "--remove", "--dry-run")[:3] == [("remove", path) for path in INSTALLED]
    assert run(root) == [("write", INSTALLED[0]), ("write", INSTALLED[1]), ("link", INSTALLED[2])]
    assert run(root) == [("unchanged", path) for path in INSTALLED]


def test_an_enabled_unit_is_not_removed(root: Path) -> None:
    run(root)
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    (wants / "weightfs@models.service").symlink_to("../weightfs@.service")
    before = everything(root)
    done = weightfs("setup", "--root", str(root), "--remove")
    assert done.returncode == 75
    assert "systemctl disable --now weightfs@models.service" in done.stderr
    assert everything(root) == before


def test_without_systemd_the_helper_alone(root: Path) -> None:
    shutil.rmtree(root / "run")
    done = weightfs("setup", "--root", str(root))
    assert done.returncode == 0
    assert "systemd does not run here" in done.stdout
    assert os.listdir(root / "etc/systemd/system") == []
    assert (root / "sbin/mount.weightfs").is_symlink()


def test_purge_alone_makes_no_sense(root: Path) -> None:
    done = weightfs("setup", "--root", str(root), "--purge", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "usage"


def test_who_may_not(root: Path) -> None:
    """A file stands where a folder would have to be: also root may not write there."""
    shutil.rmtree(root / "sbin")
    (root / "sbin").write_text("")
    done = weightfs("setup", "--root", str(root))
    assert done.returncode == 1
    assert done.stderr.startswith(f"weightfs: {root}/sbin/mount.weightfs: can't link it: ")


def test_a_path_that_a_unit_can_not_name() -> None:
    with pytest.raises(UnfitError, match="can't name"):
        unit_text(UNITS[0], "/a path/weightfs")


def test_systemd_understands_the_units(root: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("this machine lacks systemd-analyze")
    run(root)
    folder = root / "etc/systemd/system"
    (folder / "weightfs@models.service").symlink_to("weightfs@.service")
    for name in ("weightfs.service", "weightfs@models.service"):
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(folder / name)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        # Debian 12's systemd does not know that key (254 does), and keeps descriptors over a restart without it.
        lines = (line for line in done.stderr.splitlines() if "FileDescriptorStorePreserve" not in line)
        about_ours = [line for line in lines if "weightfs" in line]
        assert about_ours == []


def test_a_wheel_carries_the_units(tmp_path: Path) -> None:
    """Where setuptools looks for them; no index is asked."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, tmp_path)
    for name in ("weightfs", "prefetch", "checkpoint"):
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("this machine lacks setuptools >= 77")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
    assert {f"weightfs/cli/units/{name}" for name in UNITS} <= set(names)
