"""Budgets, sizes and layers, on a machine made of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefetch.budget import effective_budget
from tests.helpers.fake_memory import GIB, MIB, MOUNTED_V1, MOUNTED_V2, V1, V2, FakeMachine
from weightfs.errors import UsageError
from weightfs.memory import memory_group, read_memory
from weightfs.sizes import parse_bytes, parse_layers, parse_seconds


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    fake = FakeMachine(tmp_path)
    fake.meminfo(64 * GIB, 40 * GIB)
    return fake


def test_half_of_the_available_memory_where_nothing_limits(machine: FakeMachine) -> None:
    budget = effective_budget(root=machine.root)
    assert (budget.nbytes, budget.available_bytes, budget.asked_bytes) == (20 * GIB, 40 * GIB, None)
    assert (budget.cgroup, budget.cgroup_limit_bytes, budget.cgroup_free_bytes) == (None, None, None)
    assert budget.limited_by == "half of the available memory"


def test_half_of_what_the_group_leaves(machine: FakeMachine) -> None:
    machine.groups(V2, MOUNTED_V2)
    machine.version_2("/a", used=20 * GIB, max=30 * GIB)
    machine.version_2("/a/b", used=6 * GIB, inactive=2 * GIB, max=16 * GIB, high=12 * GIB)
    budget = effective_budget(root=machine.root)
    assert budget.cgroup == machine.path("/sys/fs/cgroup/a/b")
    assert budget.cgroup_limit_bytes == 12 * GIB
    assert budget.cgroup_free_bytes == 8 * GIB, "12 - 6 + 2"
    assert budget.nbytes == 4 * GIB
    assert "a/b" in budget.limited_by


def test_a_group_further_up_may_leave_less(machine: FakeMachine) -> None:
    machine.groups(V1, MOUNTED_V1)
    machine.version_1("", used=50 * GIB)
    machine.version_1("/a", used=29 * GIB, inactive=1 * GIB, limit=30 * GIB)
    machine.version_1("/a/b", used=1 * GIB, limit=8 * GIB)
    budget = effective_budget(root=machine.root)
    assert budget.cgroup == machine.path("/sys/fs/cgroup/memory/a/b")
    assert (budget.cgroup_limit_bytes, budget.cgroup_free_bytes, budget.nbytes) == (8 * GIB, 2 * GIB, 1 * GIB)
    assert budget.limited_by == f"half of what the limit of {machine.path('/sys/fs/cgroup/memory/a')} leaves"


def test_without_limits_the_group_is_still_named(machine: FakeMachine) -> None:
    machine.groups(V1, MOUNTED_V1)
    machine.version_1("/a/b", used=1 * GIB)
    budget = effective_budget(root=machine.root)
    assert budget.cgroup == machine.path("/sys/fs/cgroup/memory/a/b")
    assert (budget.cgroup_limit_bytes, budget.nbytes) == (None, 20 * GIB)


@pytest.mark.parametrize(
    ("asked", "nbytes", "said"),
    [
        (5 * GIB, 5 * GIB, "what was asked for"),
        (15 * GIB, 10 * GIB, "the limit of"),
        (90 * GIB, 10 * GIB, "the limit of"),
        (0, 0, "what was asked for"),
    ],
)
def test_what_was_asked_for_is_capped_and_said(machine: FakeMachine, asked: int, nbytes: int, said: str) -> None:
    machine.groups(V2, MOUNTED_V2)
    machine.version_2("/a/b", used=9 * GIB, max=10 * GIB)
    budget = effective_budget(asked, root=machine.root)
    assert (budget.nbytes, budget.asked_bytes) == (nbytes, asked)
    assert budget.limited_by.startswith(said)


def test_more_than_the_machine_has_available(machine: FakeMachine) -> None:
    budget = effective_budget(50 * GIB, root=machine.root)
    assert budget.nbytes == 40 * GIB
    assert "less than was asked for" in budget.limited_by


def test_a_group_that_is_full_leaves_nothing(machine: FakeMachine) -> None:
    machine.groups(V2, MOUNTED_V2)
    machine.version_2("/a/b", used=11 * GIB, max=10 * GIB)
    assert effective_budget(root=machine.root).nbytes == 0


def test_the_controller_may_be_on_further_up_only(machine: FakeMachine) -> None:
    machine.groups(V2, MOUNTED_V2)
    machine.version_2("/a", used=1 * GIB, max=3 * GIB)
    machine.say("/sys/fs/cgroup/a/b/cgroup.procs", "1\n")
    group = memory_group(machine.root)
    assert group is not None
    assert (group.path, group.version) == (machine.path("/sys/fs/cgroup/a"), 2)
    lowest = read_memory(machine.root).lowest
    assert lowest is not None
    assert lowest.nbytes == 3 * GIB


def test_a_container_sees_its_own_group_as_the_topmost(machine: FakeMachine) -> None:
    machine.groups(V1, MOUNTED_V1.replace(" / /sys", " /a/b /sys"))
    machine.version_1("", used=100 * MIB, limit=500 * MIB)
    budget = effective_budget(root=machine.root)
    assert budget.cgroup == machine.path("/sys/fs/cgroup/memory")
    assert budget.nbytes == 200 * MIB


def test_a_machine_that_tells_nothing_gets_nothing(tmp_path: Path) -> None:
    budget = effective_budget(5 * GIB, root=str(tmp_path))
    assert budget.nbytes == 0
    assert "can't be read" in budget.limited_by


def test_an_old_meminfo(machine: FakeMachine) -> None:
    machine.say("/proc/meminfo", "MemTotal: 4096 kB\nMemFree: 2048 kB\n")
    assert effective_budget(root=machine.root).nbytes == MIB


def test_this_machine() -> None:
    memory = read_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
    budget = effective_budget()
    assert 0 < budget.nbytes <= budget.available_bytes // 2 + 256 * MIB


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("20GiB", 20 * GIB), ("20G", 20 * GIB), ("20gb", 20 * GIB), ("512MiB", 512 * MIB), ("1 KiB", 1024),
        ("0", 0), ("123456", 123456), ("17B", 17), ("1.5G", 3 * GIB // 2), ("2T", 2048 * GIB), (" 1M ", MIB),
    ],
)  # fmt: skip
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "G", "-1", "1.5", "20 GiB x", "1e9", "20GiBB", "5iB", "٣G", "0x10", "9" * 30, "2000000T", "1,5G", "nan"],
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0s", 0), ("90s", 90), ("30M", 1800), (" 12h ", 43_200), ("7d", 604_800), ("2w", 1_209_600)]
)
def test_time_spans(text: str, seconds: int) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "1.5d", "-1d", "7 d", "10000w", "999999999w"])
def test_no_time_spans(text: str) -> None:
    with pytest.raises(UsageError):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("0-3", {"0", "1", "2", "3"}), ("5", {"5"}), ("7-7", {"7"}), ("embedding,0-1", {"embedding", "0", "1"}),
        ("head, 2", {"head", "2"}), ("007", {"7"}),
    ],
)  # fmt: skip
def test_layers(text: str, labels: set[str]) -> None:
    assert parse_layers(text) == labels


@pytest.mark.parametrize("text", ["", "3-0", "-1", "0-", "1,,2", "0-100000", "0-999999999", "a-b", "0 - 3", "٣"])
def test_no_layers(text: str) -> None:
    with pytest.raises(UsageError):
        parse_layers(text)
