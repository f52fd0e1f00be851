"""What doctor says of budgets and locked memory."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.helpers.fake_memory import GIB, MOUNTED_V1, MOUNTED_V2, V1, V2, FakeMachine
from weightfs import linux, memory_checks


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    fake = FakeMachine(tmp_path)
    fake.meminfo(64 * GIB, 40 * GIB)
    return fake


def test_nothing_limits(machine: FakeMachine) -> None:
    found = memory_checks.memory_budget(root=machine.root)
    assert (found.name, found.state) == ("memory-budget", "ok")
    assert found.detail == "20480 MiB, half of the available memory; page cache is charged to no memory control group"


def test_a_group_without_a_limit_is_named(machine: FakeMachine) -> None:
    machine.groups(V1, MOUNTED_V1)
    machine.version_1("/a/b", used=1 * GIB)
    found = memory_checks.memory_budget(root=machine.root)
    assert found.state == "ok"
    assert found.detail.endswith(f"charged to {machine.path('/sys/fs/cgroup/memory/a/b')} (no limit)")


@pytest.mark.parametrize(
    ("limit", "asked", "state"),
    [
        (30 * GIB, None, "ok"),
        (19 * GIB, None, "degraded"),
        (3 * GIB, 1 * GIB, "degraded"),
        (8 * GIB, 6 * GIB, "ok"),
        (8 * GIB, 9 * GIB, "degraded"),
    ],
)
def test_a_limit_under_the_budget(machine: FakeMachine, limit: int, asked: int | None, state: str) -> None:
    machine.groups(V2, MOUNTED_V2)
    machine.version_2("/a/b", used=1 * GIB, max=limit)
    found = memory_checks.memory_budget(asked, root=machine.root)
    assert found.state == state
    assert f"(limit {limit >> 20} MiB)" in found.detail
    assert (found.mend is not None and "MemoryMax=" in found.mend) == (state == "degraded")
    assert not found.needed


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    found = memory_checks.memory_budget(root=str(tmp_path))
    assert found.state == "degraded"
    assert found.mend


@pytest.mark.parametrize(
    ("holds", "hard", "state"),
    [
        (True, 8 << 20, "ok"),
        (False, 8 << 20, "degraded"),
        (False, 1 << 30, "ok"),
        (False, resource.RLIM_INFINITY, "ok"),
    ],
)
def test_memory_lock(monkeypatch: pytest.MonkeyPatch, holds: bool, hard: int, state: str) -> None:
    monkeypatch.setattr(linux, "has_capability", lambda _: holds)
    monkeypatch.setattr(linux, "in_initial_user_namespace", lambda: True)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, hard))
    found = memory_checks.memory_lock()
    assert found.state == state
    if state == "degraded":
        assert "8192 KiB" in found.detail
        assert found.mend is not None
        assert "LimitMEMLOCK=infinity" in found.mend
        assert "ulimit -l" in found.mend


def test_on_this_machine() -> None:
    found = memory_checks.checks()
    assert [check.name for check in found] == ["memory-budget", "memory-lock"]
    assert all(check.mend for check in found if check.state != "ok")
