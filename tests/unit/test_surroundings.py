"""The checks of what surrounds a mount, with what /proc and /sys say put in their place."""

from __future__ import annotations

import builtins
import io
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_memory import MOUNTED_V1, MOUNTED_V2, V1, V2, FakeMachine
from tests.unit.support import python
from weightfs import linux, mounts, surroundings

Say = Callable[[dict[str, str]], None]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Let files have other content."""
    real = builtins.open

    def use(files: dict[str, str]) -> None:
        def fake(path: Any, *arguments: Any, **options: Any) -> Any:
            if path in files:
                return io.StringIO(files[path])
            return real(path, *arguments, **options)

        for module in (surroundings, mounts, linux):
            monkeypatch.setattr(module, "open", fake, raising=False)

    return use


ROOT = "22 1 254:0 / / rw{shared} - ext4 /dev/vda rw\n"
OURS = "30 {parent} 0:50 / /models ro - fuse.weightfs /srv/models ro\n"
DATA = "25 22 254:1 / /data rw{shared} - ext4 /dev/vdb rw\n"


@pytest.mark.parametrize(
    ("table", "state", "named"),
    [
        (ROOT.format(shared=" shared:1"), "ok", ""),
        (ROOT.format(shared=""), "degraded", "/: not shared"),
        (ROOT.format(shared=" master:1"), "degraded", "/: not shared"),
        (ROOT.format(shared=" shared:1") + OURS.format(parent=22), "ok", ""),
        (ROOT.format(shared=" shared:1") + DATA.format(shared="") + OURS.format(parent=22), "ok", ""),
        (ROOT.format(shared=" shared:1") + DATA.format(shared="") + OURS.format(parent=25), "degraded", "/data: not"),
        (
            ROOT.format(shared="") + DATA.format(shared=" shared:2") + OURS.format(parent=25),
            "degraded",
            "/: not shared",
        ),
    ],
)
def test_propagation(say: Say, table: str, state: str, named: str) -> None:
    say({"/proc/self/mountinfo": table})
    found = surroundings.propagation()
    assert found.state == state
    assert named in found.detail


@pytest.mark.parametrize(
    ("version", "place", "limits", "state", "named"),
    [
        (2, "/a/b", {}, "ok", "no limit on memory"),
        (2, "/a/b", {"max": 1 << 29}, "degraded", "/sys/fs/cgroup/a/b allows 512 MiB"),
        (2, "/a", {"high": 1 << 28}, "degraded", "/sys/fs/cgroup/a allows 256 MiB"),
        (2, "/a/b", {"max": 1 << 50}, "ok", "below what the machine has"),
        (1, "/a/b", {}, "ok", "no limit on memory"),
        (1, "/a", {"limit": 1 << 30}, "degraded", "/sys/fs/cgroup/memory/a allows 1024 MiB"),
    ],
)
def test_memory_cgroup(
    tmp_path: Path, version: int, place: str, limits: dict[str, int], state: str, named: str
) -> None:
    machine = FakeMachine(tmp_path)
    machine.meminfo(8 << 30, 4 << 30)
    machine.groups(*((V1, MOUNTED_V1) if version == 1 else (V2, MOUNTED_V2)))
    for group in ("/a", "/a/b"):
        here = limits if group == place else {}
        (machine.version_1 if version == 1 else machine.version_2)(group, 0, **here)
    found = surroundings.memory_cgroup(machine.root)
    assert found.state == state
    assert named in found.detail


def test_no_memory_cgroup(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.groups("9:name=systemd:/\n0::/\n", MOUNTED_V2)
    assert surroundings.memory_cgroup(machine.root).detail == "no limit on memory"


@pytest.mark.parametrize(("count", "state"), [("8192", "degraded"), ("1048576", "ok")])
def test_watches(say: Say, count: str, state: str) -> None:
    say({"/proc/sys/fs/inotify/max_user_watches": f"{count}\n"})
    assert surroundings.watches().state == state
    assert count in surroundings.watches().detail


@pytest.mark.parametrize(
    ("hard", "state"), [(1024, "degraded"), (65536, "ok"), (resource.RLIM_INFINITY, "ok")]
)  # fmt: skip
def test_open_files(monkeypatch: pytest.MonkeyPatch, hard: int, state: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, hard))
    assert surroundings.open_files().state == state


@pytest.mark.parametrize(("holds", "state"), [(True, "ok"), (False, "degraded")])
def test_oom_and_namespaces(monkeypatch: pytest.MonkeyPatch, holds: bool, state: str) -> None:
    monkeypatch.setattr(linux, "has_capability", lambda _: holds)
    monkeypatch.setattr(linux, "in_initial_user_namespace", lambda: holds)
    monkeypatch.setattr(linux, "kernel_version", lambda: (6, 12) if holds else (6, 11))
    assert surroundings.oom().state == state
    assert surroundings.user_namespace().state == state
    assert surroundings.idmapped_mounts().state == state


def test_names_are_told_apart_and_what_is_not_well_says_what_to_do() -> None:
    found = surroundings.checks()
    assert len({check.name for check in found}) == len(found) == 7
    assert all(check.mend for check in found if check.state != "ok")
    assert not any(check.needed for check in found)


@pytest.mark.parametrize(
    ("privileged", "initial", "named"),
    [(True, True, None), (False, True, "CAP_SYS_ADMIN"), (True, False, "user namespace")],
)
def test_why_there_is_no_passthrough(
    monkeypatch: pytest.MonkeyPatch, privileged: bool, initial: bool, named: str | None
) -> None:
    monkeypatch.setattr(mounts, "is_privileged", lambda: privileged)
    monkeypatch.setattr(linux, "in_initial_user_namespace", lambda: initial)
    refusal = mounts.passthrough_refusal()
    assert (refusal is None) if named is None else (refusal is not None and named in refusal)


def test_the_file_limit_goes_up_to_the_hard_one() -> None:
    code = """
import resource
from weightfs import linux
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4000))
print(linux.raise_file_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    assert python(code).stdout == "4000 (4000, 4000)\n"


def test_a_score_that_somebody_set_is_kept() -> None:
    code = """
from weightfs import linux
print(linux.avoid_oom() == (linux.OOM_SCORE if linux.has_capability(linux.CAP_SYS_RESOURCE) else 0))
open("/proc/self/oom_score_adj", "w").write("500")
print(linux.avoid_oom(), open("/proc/self/oom_score_adj").read().strip())
"""
    done = python(code)
    assert done.stdout == "True\n500 500\n", done.stderr


def test_the_kernels_version(monkeypatch: pytest.MonkeyPatch) -> None:
    release = os.uname()
    for text, version in (("6.18.44-fc", (6, 18)), ("5.4", (5, 4)), ("odd", (0, 0))):
        fake = os.uname_result((release.sysname, release.nodename, text, release.version, release.machine))
        monkeypatch.setattr(os, "uname", lambda fake=fake: fake)
        assert linux.kernel_version() == version
