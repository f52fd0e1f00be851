"""The project's own tooling: tools/run, its set-up helper, and the import contracts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What the scripts call themselves; everything else (a compiler, fusermount3) is absent until a test provides it.
SCRIPT_COMMANDS = [
    "bash",
    "basename",
    "dirname",
    "env",
    "find",
    "flock",
    "mkdir",
    "readlink",
    "rm",
    "sed",
    "sha256sum",
    "sort",
    "tail",
]


@dataclass(frozen=True)
class Checkout:
    """A copy of the tooling in a folder with a space in its name, and a PATH with little on it."""

    root: Path
    bin: Path

    def provide(self, name: str, script: str = "exit 0") -> None:
        """Put a stand-in command on PATH."""
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def make_current(self, stamp: str) -> None:
        """Make .venv look as a finished set-up leaves it, with a stand-in for weightfs that prints its arguments."""
        programs = self.root / ".venv/bin"
        programs.mkdir(parents=True)
        (programs / "python").symlink_to(sys.executable)
        (programs / "weightfs").write_text('#!/bin/bash\nprintf "<%s>" "$@"\n')
        (programs / "weightfs").chmod(0o755)
        keys = 'tool=x root=$1; . "$1/tools/lib/setup.sh"; environment_key "$2"; printf " %s" "$(requirements_key)"'
        text = subprocess.run(
            ["bash", "-c", keys, "bash", self.root, programs / "python"], capture_output=True, text=True, check=True
        ).stdout
        (self.root / f".venv/.stamp.{stamp}").write_text(text)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run tools/run with these arguments, from another folder, without a terminal."""
        return subprocess.run(
            [self.root / "tools/run", *arguments],
            env={"PATH": str(self.bin), "HOME": str(self.root)} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd="/",
            timeout=60,
        )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "a checkout"
    (root / "tools/lib").mkdir(parents=True)
    for name in ["pyproject.toml", "tools/run", "tools/install-criu", "tools/lib/setup.sh"]:
        shutil.copy(ROOT / name, root / name)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in SCRIPT_COMMANDS:
        found = shutil.which(name)
        assert found, name
        (commands / name).symlink_to(found)
    (commands / "python3").symlink_to(sys.executable)
    return Checkout(root, commands)


def test_no_install_names_every_missing_package_and_changes_nothing(checkout: Checkout) -> None:
    checkout.provide("apt-get", "echo called >&2; exit 9")
    result = checkout.run("--no-install", "status")
    assert result.returncode == 3
    assert result.stdout == ""
    assert "apt-get install gcc libc6-dev pkg-config libfuse3-dev fuse3" in result.stderr
    assert "tools/run' --help" in result.stderr
    assert "called" not in result.stderr
    assert not (checkout.root / ".venv").exists()


def test_what_is_there_in_another_form_is_not_asked_for(checkout: Checkout) -> None:
    for name in ["cc", "pkg-config", "fusermount3"]:
        checkout.provide(name)
    result = checkout.run("--no-install")
    assert result.returncode == 3
    assert "system packages" not in result.stderr
    assert "Python packages" in result.stderr


def test_without_apt_the_packages_are_still_named(checkout: Checkout) -> None:
    result = checkout.run("status")
    assert result.returncode == 3
    assert "this system's tool: gcc libc6-dev pkg-config libfuse3-dev fuse3" in result.stderr


def test_an_unfit_python_is_named(checkout: Checkout) -> None:
    result = checkout.run("status", PYTHON="/nowhere/python3")
    assert result.returncode == 3
    assert "PYTHON=/nowhere/python3 is not Python 3.11 or newer" in result.stderr


def test_once_set_up_arguments_reach_weightfs_as_they_are(checkout: Checkout) -> None:
    checkout.provide("fusermount3")
    checkout.make_current("base")
    result = checkout.run("ls", "two  words", "", "$HOME", "--json")
    assert (result.stdout, result.stderr, result.returncode) == ("<ls><two  words><><$HOME><--json>", "", 0)


def test_the_demo_needs_more_but_not_its_help(checkout: Checkout) -> None:
    checkout.provide("fusermount3")
    checkout.make_current("base")
    assert checkout.run("demo", "--help").stdout == "<demo><--help>"
    demo = checkout.run("--no-install", "demo")
    assert demo.returncode == 3
    assert "tools/run' demo" in demo.stderr
    assert checkout.run("--no-install").returncode == 0


@pytest.mark.parametrize("change", ["pyproject.toml", "tools/lib/setup.sh", ".venv/.installing"])
def test_a_change_or_an_interrupted_set_up_is_noticed(checkout: Checkout, change: str) -> None:
    checkout.provide("fusermount3")
    checkout.make_current("base")
    with (checkout.root / change).open("a") as file:
        file.write("\n# changed\n")
    assert checkout.run("--no-install").returncode == 3


def test_a_moved_checkout_is_noticed(checkout: Checkout) -> None:
    checkout.provide("fusermount3")
    checkout.make_current("base")
    moved = checkout.root.rename(checkout.root.parent / "elsewhere")
    assert Checkout(moved, checkout.bin).run("--no-install").returncode == 3


def test_only_a_snapshot_command_asks_for_criu(checkout: Checkout) -> None:
    checkout.provide("fusermount3")
    checkout.make_current("base")
    asked = checkout.root / "asked"
    checkout.provide("criu", f'echo "$1" >>"{asked}"; echo "Version: 4.10.2"')
    checkout.run("snapshot", "list")
    assert not asked.exists()
    restore = checkout.run("snapshot", "restore", "warm")
    assert (restore.stdout, restore.returncode) == ("<snapshot><restore><warm>", 0)
    assert asked.read_text() == "--version\n"
    assert "CRIU" not in restore.stderr, "one that is there is not talked about"
    assert checkout.run("--no-install", "snapshot", "run").returncode == 0
    assert "check" in asked.read_text().split()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('[[ $1 == --version ]] && echo "Version: 3.17.1"', "or later is here"),
        ("echo 'libnet.so.1: not found' >&2; exit 127", "or later is here"),
        (
            '[[ $1 == --version ]] && echo "Version: 4.10.2" || { echo "Error (a.c:1): no ptrace"; exit 1; }',
            "no ptrace",
        ),
    ],
)
def test_a_criu_that_will_not_do_is_told(checkout: Checkout, script: str, reason: str) -> None:
    checkout.provide("fusermount3")
    checkout.make_current("base")
    checkout.provide("criu", script)
    nowhere = str(checkout.root / "criu")
    checked = subprocess.run(
        [checkout.root / "tools/install-criu", "--no-install", "--prefix", nowhere],
        env={"PATH": str(checkout.bin)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert checked.returncode == 3
    assert reason in checked.stderr


# The import contracts, tried on a tree of modules that holds nothing but imports.

ALLOWED = {
    "weightfs/cli/main.py": ["weightfs.service", "weightfs.fleet", "checkpoint.session"],
    "weightfs/service.py": ["weightfs.fuse", "weightfs.channel", "prefetch.scheduler", "pyfuse3", "trio"],
    "weightfs/fuse.py": ["weightfs.filesystem", "weightfs.errors", "pyfuse3"],
    "weightfs/channel.py": ["weightfs.filesystem", "weightfs.reads", "weightfs.linux"],
    "weightfs/reads.py": ["weightfs.kernel"],
    "weightfs/kernel.py": [],
    "weightfs/filesystem.py": ["weightfs.listings", "weightfs.tree", "weightfs.index.store", "weightfs.source.local"],
    "weightfs/listings.py": ["weightfs.virtual", "weightfs.entries"],
    "weightfs/virtual.py": ["weightfs.views", "weightfs.asking"],
    "weightfs/views.py": ["weightfs.asking", "weightfs.open_files", "weightfs.entries"],
    "weightfs/asking.py": ["weightfs.entries", "weightfs.source.local"],
    "weightfs/open_files.py": [],
    "weightfs/entries.py": [],
    "weightfs/tree.py": ["weightfs.index.store"],
    "weightfs/index/store.py": ["weightfs.formats.layout", "weightfs.index.database"],
    "weightfs/index/database.py": ["weightfs.index.opening", "lmdb"],
    "weightfs/index/opening.py": ["lmdb"],
    "weightfs/source/local.py": ["weightfs.linux"],
    "weightfs/formats/layout.py": ["weightfs.errors", "msgspec"],
    "weightfs/torch/loader.py": ["prefetch.staging", "torch"],
    "weightfs/torch/released.py": ["checkpoint.client", "cuda"],
    "weightfs/fleet/hosts.py": ["ray"],
    "weightfs/supervision/supervisor.py": ["weightfs.ledger", "weightfs.errors"],
    "weightfs/ledger.py": [],
    "weightfs/linux.py": [],
    "weightfs/errors.py": [],
    "prefetch/scheduler.py": ["prefetch.staging", "weightfs.formats.layout", "trio"],
    "prefetch/staging.py": [],
    "prefetch/pinned.py": ["cuda"],
    "checkpoint/session.py": ["checkpoint.cuda"],
    "checkpoint/cuda.py": ["cuda"],
    "checkpoint/client.py": [],
}
FORBIDDEN = [
    ("layers", "weightfs/errors.py", "weightfs.formats.layout"),
    ("layers", "weightfs/tree.py", "weightfs.filesystem"),
    ("layers", "weightfs/source/local.py", "weightfs.filesystem"),
    ("layers", "weightfs/filesystem.py", "weightfs.fuse"),
    ("layers", "weightfs/listings.py", "weightfs.filesystem"),
    ("layers", "weightfs/views.py", "weightfs.virtual"),
    ("layers", "weightfs/asking.py", "weightfs.open_files"),
    ("layers", "weightfs/entries.py", "weightfs.views"),
    ("layers", "weightfs/fuse.py", "weightfs.channel"),
    ("layers", "weightfs/channel.py", "weightfs.service"),
    ("layers", "weightfs/reads.py", "weightfs.channel"),
    ("layers", "weightfs/kernel.py", "weightfs.filesystem"),
    ("layers", "weightfs/service.py", "weightfs.cli.main"),
    ("layers", "weightfs/supervision/supervisor.py", "weightfs.service"),
    ("supervision", "weightfs/ledger.py", "trio"),
    ("supervision", "weightfs/supervision/supervisor.py", "weightfs.index.store"),
    ("layers", "prefetch/scheduler.py", "weightfs.index.store"),
    ("layers", "prefetch/scheduler.py", "checkpoint.session"),
    ("layers", "checkpoint/session.py", "prefetch.staging"),
    ("layers", "checkpoint/session.py", "weightfs.service"),
    ("formats", "weightfs/formats/layout.py", "trio"),
    ("formats", "weightfs/formats/layout.py", "pyfuse3"),
    ("formats", "weightfs/formats/layout.py", "lmdb"),
    ("formats", "weightfs/formats/layout.py", "weightfs.linux"),
    ("prefetch", "weightfs/filesystem.py", "prefetch.scheduler"),
    ("prefetch", "weightfs/torch/loader.py", "prefetch.scheduler"),
    ("checkpoint", "weightfs/service.py", "checkpoint.session"),
    ("pyfuse3", "weightfs/filesystem.py", "pyfuse3"),
    ("pyfuse3", "weightfs/cli/main.py", "pyfuse3"),
    ("lmdb", "weightfs/tree.py", "lmdb"),
    ("lmdb", "weightfs/index/schema.py", "lmdb"),
    ("lmdb", "weightfs/index/store.py", "lmdb"),
    ("cuda", "prefetch/staging.py", "cuda"),
    ("torch", "weightfs/cli/main.py", "torch"),
    ("ray", "weightfs/service.py", "ray"),
]


def lint_imports(folder: Path, modules: dict[str, list[str]]) -> subprocess.CompletedProcess[str]:
    """Lay the modules out in `folder` and check them against the contracts in pyproject.toml."""
    for name, imports in modules.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in path.relative_to(folder).parents[:-1]:
            (folder / package / "__init__.py").touch()
        path.write_text("".join(f"import {module}\n" for module in imports))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return subprocess.run(
        [sys.executable, "-c", "from importlinter import cli; cli.lint_imports_command()", "--no-cache"],
        env={"PYTHONPATH": str(folder), "PATH": os.environ["PATH"], "COLUMNS": "200"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_imports_of_the_architecture_are_allowed(tmp_path: Path) -> None:
    result = lint_imports(tmp_path, ALLOWED)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


def test_contracts_hold_while_most_modules_are_missing(tmp_path: Path) -> None:
    few = ["weightfs/errors.py", "weightfs/formats/layout.py", "prefetch/order.py", "checkpoint/states.py"]
    result = lint_imports(tmp_path, {module: [] for module in few})
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("contract", "module", "imported"), FORBIDDEN)
def test_a_forbidden_import_breaks_its_contract(tmp_path: Path, contract: str, module: str, imported: str) -> None:
    result = lint_imports(tmp_path, ALLOWED | {module: [*ALLOWED.get(module, []), imported]})
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    name = next(c["name"] for c in contracts if c["id"] == contract)
    assert result.returncode == 1, result.stdout
    assert f"{name} BROKEN" in result.stdout
