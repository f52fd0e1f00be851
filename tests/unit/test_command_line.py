"""The command line: every command is there, and one imports no more than it needs."""

from __future__ import annotations

import importlib.metadata

import pytest
import typer
from typer.testing import CliRunner

from tests.unit.support import python
from weightfs.cli.main import app

COMMANDS = [
    "mount", "umount", "status", "warm", "evict", "residency", "ls", "record", "verify", "doctor", "timeline", "setup",
    "demo",
]  # fmt: skip
SNAPSHOT_COMMANDS = ["create", "restore", "run", "recover", "list", "show", "verify", "rm", "prune", "rotate"]
HEAVY = {
    "cryptography", "gguf", "hypothesis", "lmdb", "numpy", "pydantic", "pyfuse3", "prometheus_client", "rich", "trio",
}  # fmt: skip
"""Libraries that `snapshot restore` does without: each takes the processor 20 ms or more."""
RUN = """
import sys
from weightfs.cli.main import app
sys.argv = ["weightfs", *sys.argv[1:]]
try:
    app()
except SystemExit as e:
    assert e.code in (0, 1, 3), e.code
sys.stderr.write("modules: " + " ".join(sys.modules))
"""


def modules_of(*arguments: str) -> set[str]:
    """What is imported once a command has ended."""
    done = python(RUN, *arguments)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rpartition("modules: ")[2].split())


def test_every_command_is_there() -> None:
    group = typer.main.get_command(app)
    assert group.list_commands(None) == [*COMMANDS, "snapshot"]  # type: ignore[attr-defined]
    inner = group.commands["snapshot"]  # type: ignore[attr-defined]
    assert inner.list_commands(None) == SNAPSHOT_COMMANDS


@pytest.mark.parametrize(
    "command", [[one] for one in COMMANDS] + [["snapshot", one] for one in SNAPSHOT_COMMANDS], ids=" ".join
)
def test_every_command_helps_with_an_example(command: list[str]) -> None:
    said = CliRunner().invoke(app, [*command, "--help"])
    assert said.exit_code == 0, said.output
    assert command == ["demo"] or f"Example: weightfs {' '.join(command)}" in said.output


def test_help_lists_every_command_with_what_it_does() -> None:
    said = CliRunner().invoke(app, ["--help"]).output
    assert all(f" {one} " in said for one in [*COMMANDS, "snapshot"])
    assert "Show SOURCE at MOUNTPOINT" in said
    said = CliRunner().invoke(app, ["snapshot", "--help"]).output
    assert all(f" {one} " in said for one in SNAPSHOT_COMMANDS)
    assert "Bring a process back from its snapshot" in said


def test_version_is_told() -> None:
    said = CliRunner().invoke(app, ["--version"])
    assert said.exit_code == 0
    assert said.output == f"weightfs {importlib.metadata.version('weightfs')}\n"


@pytest.mark.parametrize("command", [["restor"], ["snapshot", "restor"]], ids=" ".join)
def test_an_unknown_command_is_a_usage_error(command: list[str]) -> None:
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 2
    assert "No such command 'restor'" in said.output


@pytest.mark.parametrize(
    ("timeout", "message"),
    [("60", "there is no snapshot"), ("0.5", "there is no snapshot"), ("soon", "Invalid value for '--timeout'")],
)
def test_numbers_are_taken_as_before(timeout: str, message: str) -> None:
    said = CliRunner().invoke(app, ["snapshot", "restore", "x", "--no-encrypt", "--timeout", timeout])
    assert message in said.output


def test_restore_imports_nothing_heavy() -> None:
    arguments = ["restore", "nothing", "--no-encrypt", "--timeout", "60", "--store", "/nonexistent", "--log", "/l"]
    modules = modules_of("snapshot", *arguments)
    assert "weightfs.cli.snapshotting" in modules
    assert not HEAVY & modules
    assert not {one for one in modules if one.startswith("prefetch")}
    assert not {"weightfs.cli.mounting", "weightfs.cli.inspecting", "weightfs.formats", "weightfs.config"} & modules


def test_recover_imports_nothing_heavy() -> None:
    assert not HEAVY & modules_of("snapshot", "recover")


def test_help_of_restore_imports_no_other_command() -> None:
    modules = modules_of("snapshot", "restore", "--help")
    assert {one for one in modules if one.startswith("checkpoint")} <= {"checkpoint"}
    assert not (HEAVY - {"rich"}) & modules
    assert not {"weightfs.cli.mounting", "weightfs.cli.inspecting"} & modules
