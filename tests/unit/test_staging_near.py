"""Threads stay on the GPU's side of a machine of several sockets."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from prefetch.near import processors_near, stay_near
from prefetch.staging import Piece, Staging, StagingConfig
from tests.helpers.driver_double import DriverDouble


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sockets of four processors; the GPU sits at the second one."""
    for node, processors in enumerate(("0-3", "4-5,6,7\n")):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(processors)
    device = tmp_path / "sys/bus/pci/devices/0000:1b:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


def near(machine: Path) -> frozenset[int] | None:
    return processors_near("0000:1b:00.0", str(machine))


def test_the_processors_of_its_node(machine: Path) -> None:
    assert near(machine) == frozenset({4, 5, 6, 7})


def test_only_those_that_may_be_used(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4})
    assert near(machine) == frozenset({4})


@pytest.mark.parametrize("allowed", [{0, 1}, {4, 5}])
def test_no_choice_where_all_or_none_are_near(
    machine: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    assert near(machine) is None


@pytest.mark.parametrize("node", ["-1\n", "7\n", "?"])
def test_no_choice_where_the_node_is_not_known(machine: Path, node: str) -> None:
    (machine / "sys/bus/pci/devices/0000:1b:00.0/numa_node").write_text(node)
    assert near(machine) is None
    assert processors_near("0000:ff:00.0", str(machine)) is None


def test_a_thread_stays_and_its_maker_does_not_notice() -> None:
    before = os.sched_getaffinity(0)
    one = frozenset(sorted(before)[:1])
    seen: list[set[int]] = []

    def work() -> None:
        stay_near(one)
        stay_near(None)
        stay_near(frozenset({4095}))
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [one]
    assert os.sched_getaffinity(0) == before


def test_a_pool_has_threads_for_the_processors_near(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(os.urandom(1 << 20))
    monkeypatch.setattr("prefetch.staging.processors_near", lambda _: frozenset({0, 1, 2, 3}))
    driver = DriverDouble()
    pool = Staging(driver, config=StagingConfig(way="ring", buffer_bytes=4096))
    with open(tmp_path / "weights", "rb") as file:
        assert pool.copy([Piece(file.fileno(), 0, 1 << 20, driver.device_memory(1 << 20))]).threads == 3
    pool.close()
    driver.check()
