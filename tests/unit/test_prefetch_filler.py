"""The filler's threads: fair, interruptible, and never taken down by what they read."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefetch.course import CHUNK_BYTES, Course
from prefetch.filler import Fill, Filler, FillerConfig
from prefetch.pace import Disks, Pace
from prefetch.plan import Extent
from prefetch.residency import drop, resident_bytes
from weightfs import linux

SOON_S = 10.0
HUGE_BYTES = 2 << 20


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A descriptor of a file of 9 MiB and a bit, of which nothing is in memory."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 20) * 9 + b"end")
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    drop(fd)
    yield fd
    os.close(fd)


@pytest.fixture
def filler() -> Iterator[Filler]:
    made = Filler(FillerConfig(depth=4))
    yield made
    made.close()


def begin(filler: Filler, fd: int, *extents: tuple[int, int]) -> Fill:
    fill = Fill(Course(Extent("f", *one) for one in extents), {"f": fd}, lambda: None)
    filler.start(fill)
    return fill


def size_of(fd: int) -> int:
    return os.fstat(fd).st_size


def test_all_of_it_is_in_memory_when_it_has_ended(filler: Filler, file: int) -> None:
    fill = begin(filler, file, (0, size_of(file)))
    assert fill.ended.wait(SOON_S)
    assert fill.failure is None
    assert fill.filled_bytes + fill.skipped_bytes == size_of(file)
    assert resident_bytes(file, 0, size_of(file)) == size_of(file)


def test_what_is_in_memory_is_not_read_again(filler: Filler, file: int) -> None:
    assert begin(filler, file, (0, size_of(file))).ended.wait(SOON_S)
    again = begin(filler, file, (0, size_of(file)))
    assert again.ended.wait(SOON_S)
    assert (again.filled_bytes, again.skipped_bytes) == (0, size_of(file))


def test_a_file_that_ends_early_ends_its_fill(filler: Filler, file: int) -> None:
    fill = begin(filler, file, (0, size_of(file)), (1 << 30, 4096))
    assert fill.ended.wait(SOON_S)
    assert fill.failure is not None
    assert "ends at byte" in fill.failure


@pytest.fixture
def huge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Filler]:
    """One that reads huge pages, whatever the hypervisor does with them."""
    if linux.kernel_version() < (5, 18) or linux.huge_page_bytes() != HUGE_BYTES:
        pytest.skip("this machine lacks huge pages of 2 MiB, or Linux 5.18")
    monkeypatch.setattr(linux, "reports_free_pages", lambda: False)
    made = Filler(FillerConfig(depth=4))
    yield made
    made.close()


def test_huge_pages_are_read_and_nothing_further_ahead(huge: Filler, file: int) -> None:
    fill = begin(huge, file, (HUGE_BYTES + 4096, 2 * HUGE_BYTES - 4096))
    assert fill.ended.wait(SOON_S)
    assert fill.filled_bytes == 2 * HUGE_BYTES - 4096
    assert resident_bytes(file, HUGE_BYTES, 2 * HUGE_BYTES) == 2 * HUGE_BYTES
    assert resident_bytes(file, 0, size_of(file)) == 2 * HUGE_BYTES


def test_huge_pages_read_all_of_a_file(huge: Filler, file: int) -> None:
    fill = begin(huge, file, (0, size_of(file)))
    assert fill.ended.wait(SOON_S)
    assert fill.filled_bytes + fill.skipped_bytes == size_of(file)
    assert resident_bytes(file, 0, size_of(file)) == size_of(file)


def test_a_file_that_ends_early_ends_its_fill_under_huge_pages(huge: Filler, file: int) -> None:
    fill = begin(huge, file, (8 << 20, 4 << 20))
    assert fill.ended.wait(SOON_S)
    assert fill.failure == f"f: ends at byte {size_of(file)} now"


@pytest.mark.parametrize(
    ("features", "reports"), [("0" * 64, False), ("11111011" + "0" * 56, False), ("00000100" + "0" * 56, True)]
)
def test_a_balloon_says_whether_free_memory_is_taken_back(tmp_path: Path, features: str, reports: bool) -> None:
    assert not linux.reports_free_pages(str(tmp_path))
    (tmp_path / "virtio_balloon" / "virtio0").mkdir(parents=True)
    (tmp_path / "virtio_balloon" / "bind").write_text("")
    (tmp_path / "virtio_balloon" / "virtio0" / "features").write_text(features + "\n")
    assert linux.reports_free_pages(str(tmp_path)) is reports


@pytest.mark.parametrize("made", ["filler", "huge"])
def test_who_reads_a_run_stops_soon_for_others_and_goes_on_later(
    made: str, file: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    filler: Filler = request.getfixturevalue(made)
    ran, real = list[int](), Filler._fill

    def noted(self: Filler, fill: Fill, chunk: Extent, sink: int) -> int:
        ran.append(chunk.offset)
        return real(self, fill, chunk, sink)

    monkeypatch.setattr(Filler, "_fill", noted)
    monkeypatch.setattr(Pace, "holds", True)
    fill = Fill(Course([Extent("f", 0, size_of(file))], 0), {"f": file}, lambda: None)
    filler.start(fill)
    assert fill.ended.wait(SOON_S)
    assert ran == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert fill.filled_bytes + fill.skipped_bytes == size_of(file)
    assert resident_bytes(file, 0, size_of(file)) == size_of(file)


def test_a_small_part_is_read_without_the_huge_page_around_it(filler: Filler, file: int) -> None:
    assert begin(filler, file, (CHUNK_BYTES + 65536, 65536)).ended.wait(SOON_S)
    assert resident_bytes(file, 0, size_of(file)) == 65536


def test_what_has_no_huge_pages_reads_all_of_it_too(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "huge_page_bytes", lambda: None)
    filler = Filler(FillerConfig(depth=4))
    fill = begin(filler, file, (0, size_of(file)))
    assert fill.ended.wait(SOON_S)
    filler.close()
    assert fill.filled_bytes + fill.skipped_bytes == size_of(file)
    assert resident_bytes(file, 0, size_of(file)) == size_of(file)


def test_a_device_that_fails_under_a_huge_page_ends_its_fill(
    huge: Filler, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

    monkeypatch.setattr(linux, "populate_huge", broken)
    fill = begin(huge, file, (0, CHUNK_BYTES))
    assert fill.ended.wait(SOON_S)
    assert fill.failure == f"f: {os.strerror(errno.EIO)}"


def test_a_device_that_fails_ends_its_fill_and_no_other(
    filler: Filler, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.sendfile

    def broken(out: int, fd: int, offset: int, count: int) -> int:
        if offset < 4096:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(out, fd, offset, count)

    monkeypatch.setattr(os, "sendfile", broken)
    bad, good = begin(filler, file, (0, 4096)), begin(filler, file, (CHUNK_BYTES, 4096))
    assert bad.ended.wait(SOON_S)
    assert good.ended.wait(SOON_S)
    assert bad.failure == f"f: {os.strerror(errno.EIO)}"
    assert good.failure is None


def test_a_read_that_never_returns_holds_up_its_thread_alone(
    filler: Filler, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, let_go = os.sendfile, threading.Event()

    def stuck(out: int, fd: int, offset: int, count: int) -> int:
        if offset == 0:
            let_go.wait(SOON_S)
        return real(out, fd, offset, count)

    monkeypatch.setattr(os, "sendfile", stuck)
    waits = begin(filler, file, (0, 4096))
    others = [begin(filler, file, (CHUNK_BYTES, 1 << 20)) for _ in range(5)]
    assert all(one.ended.wait(SOON_S) for one in others)
    assert not waits.ended.is_set()
    let_go.set()
    assert waits.ended.wait(SOON_S)


def test_a_read_that_never_returns_holds_up_nobody_once_it_was_cancelled(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, let_go, stand = os.sendfile, threading.Event(), threading.Semaphore(0)

    def stuck(out: int, fd: int, offset: int, count: int) -> int:
        if offset < CHUNK_BYTES:
            stand.release()
            let_go.wait(SOON_S)
        return real(out, fd, offset, count)

    monkeypatch.setattr(os, "sendfile", stuck)
    monkeypatch.setattr(Disks, "read_ahead_bytes", lambda self: 128 << 10)
    filler = Filler(FillerConfig(depth=2))
    waits = begin(filler, file, (0, 4096), (4096, 4096))
    assert all(stand.acquire(timeout=SOON_S) for _ in range(2))
    filler.cancel(waits, "it does not answer")
    begun = begin(filler, file, (CHUNK_BYTES, 1 << 20))
    assert begun.ended.wait(SOON_S)
    assert not waits.ended.is_set()
    let_go.set()
    assert waits.ended.wait(SOON_S)
    filler.close()


def test_two_models_take_turns(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    filler, order = Filler(FillerConfig(depth=1)), list[str]()

    def note(self: Filler, fill: Fill, chunk: Extent, sink: int) -> int:
        order.append(chunk.file)
        return 0

    monkeypatch.setattr(Filler, "_fill", note)
    filler.halt(True)
    fills = []
    for name in ("a", "b"):
        parts = [Extent(name, number * CHUNK_BYTES, CHUNK_BYTES) for number in range(3)]
        fills.append(Fill(Course(parts), {}, lambda: None))
        filler.start(fills[-1])
    filler.halt(False)
    assert all(fill.ended.wait(SOON_S) for fill in fills)
    filler.close()
    assert "".join(order) == "ababab"


def test_while_halted_nothing_is_begun(filler: Filler, file: int) -> None:
    filler.halt(True)
    fill = begin(filler, file, (0, size_of(file)))
    assert not fill.ended.wait(0.2)
    assert fill.submitted_at is None
    filler.halt(False)
    assert fill.ended.wait(SOON_S)


def test_a_cancelled_fill_ends(filler: Filler, file: int) -> None:
    filler.halt(True)
    fill = begin(filler, file, (0, size_of(file)))
    filler.cancel(fill, "not wanted")
    filler.halt(False)
    assert fill.ended.wait(SOON_S)
    assert fill.failure == "not wanted"


def test_beside_a_demand_read_few_are_under_way(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, under_way, most = threading.Event(), [0], [0]
    lock = threading.Lock()
    asked.set()

    def counted(self: Filler, fill: Fill, chunk: Extent, sink: int) -> int:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        asked.wait(0.01)
        with lock:
            under_way[0] -= 1
        return 0

    monkeypatch.setattr(Filler, "_fill", counted)
    filler = Filler(FillerConfig(depth=8, depth_beside_demand=2), asked.is_set)
    fill = begin(filler, file, *((n * CHUNK_BYTES, CHUNK_BYTES) for n in range(40)))
    assert fill.ended.wait(SOON_S)
    filler.close()
    assert most[0] <= 2


def test_as_much_is_under_way_as_the_kernel_reads_ahead_allows(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most, lock = [0], [0], threading.Lock()

    def counted(self: Filler, fill: Fill, chunk: Extent, sink: int) -> int:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        threading.Event().wait(0.005)
        with lock:
            under_way[0] -= 1
        return 0

    monkeypatch.setattr(Filler, "_fill", counted)
    monkeypatch.setattr(Disks, "read_ahead_bytes", lambda self: 4 << 20)
    monkeypatch.setattr(linux, "reports_free_pages", lambda: True)
    filler = Filler(FillerConfig(depth=8))
    parts = (Extent("f", number * CHUNK_BYTES, CHUNK_BYTES) for number in range(40))
    fill = Fill(Course(parts), {"f": file}, lambda: None)
    filler.start(fill)
    assert fill.ended.wait(SOON_S)
    filler.close()
    assert most[0] == 2


def test_whoever_is_told_of_the_end_may_wait_for_another(filler: Filler, file: int) -> None:
    told, first = threading.Event(), Fill(Course([Extent("f", 0, 4096)]), {"f": file}, lambda: None)

    def wait() -> None:
        filler.halt(False)  # needs the filler's lock
        told.set()

    second = Fill(Course([Extent("f", 0, 4096)]), {"f": file}, wait)
    for fill in (first, second):
        filler.start(fill)
    assert told.wait(SOON_S)
    assert first.ended.wait(SOON_S)
    assert second.ended.wait(SOON_S)


def test_an_end_that_fails_is_logged_and_the_next_one_comes(
    filler: Filler, file: int, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("no")

    bad = Fill(Course([Extent("f", 0, 4096)]), {"f": file}, fail)
    filler.start(bad)
    assert bad.ended.wait(SOON_S)
    assert begin(filler, file, (0, 4096)).ended.wait(SOON_S)
    assert "the end of a prefetch failed" in caplog.text
