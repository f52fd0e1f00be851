"""What every test may use, and what no test may leave behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from checkpoint import runtime
from tests.helpers.mounting import Mounter, detach, mounts_below


def pytest_configure() -> None:
    # A shell's job in the background ignores SIGINT, and so would Python, and whatever a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long an example takes says nothing where others use the machine, too.
    settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("shared")


@pytest.fixture(scope="session", autouse=True)
def _runtime_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A snapshot command puts right what another that died has left: not another test's, nor the machine's."""
    os.environ[runtime.VARIABLE] = str(tmp_path_factory.getbasetemp() / "run")


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = str(tmp_path_factory.getbasetemp())
    yield
    left = mounts_below(base)
    for mountpoint in set(left):
        detach(mountpoint)
    assert not left, "tests left these mounted"


@pytest.fixture
def mounter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounter]:
    """Makes mounts that end with the test."""
    with Mounter(str(tmp_path_factory.mktemp("mounts"))) as mounts:
        yield mounts


@pytest.fixture(scope="module")
def module_mounter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounter]:
    """Makes mounts that end with the module, for tests that only read."""
    with Mounter(str(tmp_path_factory.mktemp("mounts"))) as mounts:
        yield mounts
