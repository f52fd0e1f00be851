"""The driver double sees what it is there to see."""

from __future__ import annotations

import ctypes
import threading

import pytest

from prefetch.errors import StagingError
from tests.helpers.driver_double import DriverDouble
from tests.unit.support import within


@pytest.fixture
def driver() -> DriverDouble:
    double = DriverDouble()
    double.retain(0)
    double.use(0)
    return double


def begun(driver: DriverDouble) -> tuple[int, int, int]:
    """A copy that has not ended: buffer, stream, event."""
    driver.gate.clear()
    buffer, stream, event = driver.allocate(4096), driver.open_stream(), driver.open_event()
    driver.copy(driver.device_memory(4096), buffer, 4096, stream)
    driver.record(event, stream)
    return buffer, stream, event


def test_a_buffer_written_before_its_copy_is_over(driver: DriverDouble) -> None:
    buffer, stream, _ = begun(driver)
    ctypes.memset(buffer + 7, 1, 1)
    driver.gate.set()
    driver.wait_stream(stream)
    assert "written before its copy was over" in driver.violations[0]


def test_a_buffer_written_after_its_event_is_fine(driver: DriverDouble) -> None:
    buffer, stream, event = begun(driver)
    waiter = threading.Thread(target=driver.wait_event, args=(event,))
    driver.use(0)
    waiter.start()
    assert waiter.is_alive()
    driver.gate.set()
    within(10, waiter.join)
    ctypes.memset(buffer, 1, 4096)
    driver.wait_stream(stream)
    assert [one for one in driver.violations if "written" in one] == []


def test_memory_freed_or_unregistered_during_a_copy(driver: DriverDouble) -> None:
    buffer, stream, _ = begun(driver)
    driver.free(buffer)
    other = driver.allocate(8192)
    driver.free(other)
    driver.register(other, 4096)
    driver.copy(driver.device_memory(4096), other, 4096, stream)
    driver.unregister(other)
    driver.gate.set()
    driver.wait_stream(stream)
    assert [one.split(" ")[0] for one in driver.violations] == ["free", "unregister"]


def test_what_is_given_back_twice_or_used_after_that(driver: DriverDouble) -> None:
    buffer, stream, event = driver.allocate(4096), driver.open_stream(), driver.open_event()
    driver.free(buffer)
    driver.free(buffer)
    driver.copy(driver.device_memory(4096), buffer, 4096, stream)
    driver.close_event(event)
    driver.close_event(event)
    driver.close_stream(stream)
    driver.close_stream(stream)
    driver.unregister(buffer)
    driver.release(0)
    driver.release(0)
    assert len(driver.violations) == 6


def test_a_thread_that_uses_no_device(driver: DriverDouble) -> None:
    thread = threading.Thread(target=driver.open_stream, name="stranger")
    thread.start()
    within(10, thread.join)
    assert driver.violations == ["open_stream in stranger, which uses no device"]


def test_what_is_left(driver: DriverDouble) -> None:
    with pytest.raises(AssertionError, match="'contexts': Counter"):
        driver.check()
    driver.release(0)
    driver.check()
    driver.retain(0)
    driver.allocate(10)
    driver.release(0)
    with pytest.raises(AssertionError, match="'pinned': 1"):
        driver.check()


def test_pages_are_registered_once(driver: DriverDouble) -> None:
    block = driver.allocate(4 * 4096)
    driver.register(block, 2 * 4096)
    with pytest.raises(StagingError, match="ALREADY_REGISTERED"):
        driver.register(block + 4096, 2 * 4096)
    driver.unregister(block)
    driver.register(block + 4096, 100)
    assert driver.violations == [f"register of parts of pages: {block + 4096:#x}, 100 bytes"]


def test_an_address_the_device_does_not_have(driver: DriverDouble) -> None:
    buffer, stream = driver.allocate(4096), driver.open_stream()
    with pytest.raises(StagingError, match="INVALID_VALUE"):
        driver.copy(64, buffer, 4096, stream)
