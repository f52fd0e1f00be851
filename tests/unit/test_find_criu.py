"""Which CRIU is used, of programs that stand in for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.criu import find_criu, parse_version
from checkpoint.errors import MisfitError


class Machine:
    """Stand-ins on PATH and where tools/install-criu puts one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, where: str, version: str, check: str = "echo Looks good.") -> str:
        program = self.folder / where / "criu"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\ncase $1 in --version) echo "Version: {version}" ;; check) {check} ;; esac\n')
        program.chmod(0o755)
        return str(program)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("PATH", f"{tmp_path}/path:/usr/bin:/bin")
    monkeypatch.setattr("checkpoint.criu.BUNDLED", str(tmp_path / "bundle/criu"))
    monkeypatch.setattr("checkpoint.criu._PLUGINS", str(tmp_path / "plugins"))
    monkeypatch.setattr("weightfs.linux.kernel_version", lambda: (6, 18))
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("Version: 4.1.1\n", (4, 1, 1)),
        ("Version: 4.2\nGitID: v4.2-3-g12\n", (4, 2, 0)),
        ("4.2", None),
        ("criu: error while loading shared libraries: libnet.so.1\n", None),
    ],
)
def test_versions(said: str, version: tuple[int, int, int] | None) -> None:
    assert parse_version(said) == version


def test_the_one_on_path_comes_first(machine: Machine) -> None:
    path = machine.put("path", "4.2")
    machine.put("bundle", "4.3")
    assert find_criu().path == path


@pytest.mark.parametrize("older", ["3.17.1", "4.1.1", "broken"])
def test_the_bundle_where_that_will_not_do(machine: Machine, older: str) -> None:
    machine.put("path", older)
    bundle = machine.put("bundle", "4.2.1")
    found = find_criu()
    assert (found.path, found.version, found.can_dump_inet) == (bundle, (4, 2, 1), True)


def test_one_that_can_dump_no_sockets_is_better_than_none(machine: Machine) -> None:
    path = machine.put("path", "4.1.1")
    found = find_criu()
    assert (found.path, found.can_dump_inet) == (path, False)


def test_before_linux_6_16_any_will_do(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightfs.linux.kernel_version", lambda: (6, 15))
    path = machine.put("path", "4.1.1")
    machine.put("bundle", "4.2")
    found = find_criu()
    assert (found.path, found.can_dump_inet) == (path, True)


def test_none(machine: Machine) -> None:
    with pytest.raises(MisfitError, match="not installed") as caught:
        find_criu()
    assert caught.value.exit_code == 3
    assert caught.value.mend == "tools/install-criu"


def test_all_too_old(machine: Machine) -> None:
    path = machine.put("path", "3.17.1")
    with pytest.raises(MisfitError, match=f"{path} is 3.17.1"):
        find_criu()


def test_a_candidate_is_the_only_one(machine: Machine) -> None:
    machine.put("path", "4.2")
    with pytest.raises(MisfitError, match="/nowhere/criu is not there"):
        find_criu("/nowhere/criu")
    other = machine.put("other", "4.2")
    assert find_criu(other).path == other


def test_a_kernel_that_lacks_something(machine: Machine) -> None:
    machine.put("path", "4.2", 'echo "Error (criu/cr-check.c:90): no tracing" >&2; exit 1')
    with pytest.raises(MisfitError, match="no tracing"):
        find_criu()
    assert find_criu(check=False).version == (4, 2, 0)
