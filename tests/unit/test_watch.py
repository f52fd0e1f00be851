"""Watches on real folders: what is told, how it is merged, and what happens where there can be none."""

from __future__ import annotations

import os
import queue
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.helpers.models import write
from weightfs import linux, watch
from weightfs.watch import Batch, Kind, Watcher

KEY = b"k" * 16


@pytest.fixture
def folder(tmp_path: Path) -> str:
    path = f"{tmp_path}/source"
    write(f"{path}/file", b"1")
    return path


@pytest.fixture
def watcher(folder: str) -> Iterator[Watcher]:
    made = Watcher(folder)
    yield made
    made.close()


def add(watcher: Watcher, folder: str, key: bytes = KEY) -> bool:
    with opened(folder) as fd:
        entry = os.fstat(fd)
        return watcher.add(fd, (entry.st_dev, entry.st_ino), key)


@contextmanager
def opened(folder: str) -> Iterator[int]:
    fd = os.open(folder, os.O_PATH)
    try:
        yield fd
    finally:
        os.close(fd)


class Told:
    """Merges what is told until it holds what a test waits for."""

    def __init__(self) -> None:
        self.names: dict[tuple[bytes, bytes], Kind] = {}
        self.batches: list[Batch] = []
        self.event = trio.Event()

    def take(self, batch: Batch) -> None:
        self.batches.append(batch)
        for name, kind in batch.names.items():
            self.names[name] = self.names.get(name, Kind(0)) | kind
        self.event.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not condition():
                self.event = trio.Event()
                await self.event.wait()


def run(watcher: Watcher, main: Callable[[Told], Awaitable[None]]) -> None:
    async def started() -> None:
        told = Told()
        watcher.start(told.take, trio.lowlevel.current_trio_token())
        await main(told)

    trio.run(started)


CHANGES: dict[str, tuple[Callable[[str], object], bytes, Kind]] = {
    "created": (lambda at: write(f"{at}/new", b""), b"new", Kind.NAME),
    "removed": (lambda at: os.unlink(f"{at}/file"), b"file", Kind.NAME),
    "renamed": (lambda at: os.rename(f"{at}/file", f"{at}/other"), b"file", Kind.NAME),
    "renamed to": (lambda at: os.rename(f"{at}/file", f"{at}/other"), b"other", Kind.NAME),
    "linked": (lambda at: os.link(f"{at}/file", f"{at}/other"), b"other", Kind.NAME),
    "written": (lambda at: write(f"{at}/file", b"22"), b"file", Kind.CONTENT),
    "truncated": (lambda at: os.truncate(f"{at}/file", 0), b"file", Kind.CONTENT),
    "chmod-ed": (lambda at: os.chmod(f"{at}/file", 0o600), b"file", Kind.ATTRIBUTES),
    "made": (lambda at: os.mkdir(f"{at}/below"), b"below", Kind.NAME),
    "itself": (lambda at: os.chmod(at, 0o700), b"", Kind.ATTRIBUTES),
    "odd name": (lambda at: write(os.fsdecode(os.fsencode(at) + b"/\xff \n"), b""), b"\xff \n", Kind.NAME),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tells(folder: str, watcher: Watcher, change: str) -> None:
    act, name, kind = CHANGES[change]
    assert add(watcher, folder)

    async def main(told: Told) -> None:
        act(folder)
        await told.until(lambda: bool(told.names.get((KEY, name), Kind(0)) & kind))

    run(watcher, main)


def test_a_folder_that_goes_is_not_watched_any_more(folder: str, watcher: Watcher) -> None:
    os.mkdir(f"{folder}/below")
    assert add(watcher, f"{folder}/below")
    assert KEY in watcher

    async def main(told: Told) -> None:
        os.rmdir(f"{folder}/below")
        await told.until(lambda: bool(told.names.get((KEY, b""), Kind(0)) & Kind.ENDED))

    run(watcher, main)
    assert KEY not in watcher
    assert len(watcher) == 0


def test_many_writes_are_told_of_a_few_times(folder: str, watcher: Watcher) -> None:
    """And the last one is among what is told of: the batch that follows it."""
    add(watcher, folder)

    async def main(told: Told) -> None:
        with open(f"{folder}/file", "wb", buffering=0) as file:
            for _ in range(20_000):
                file.write(b"x")
            before = len(told.batches)
            await told.until(lambda: len(told.batches) > before)
        assert len(told.batches) < 20

    run(watcher, main)


def test_one_batch_at_a_time(folder: str, watcher: Watcher) -> None:
    """While one is worked on the next grows: nothing is lost and nothing piles up."""
    add(watcher, folder)
    inside: list[int] = []

    async def main(told: Told) -> None:
        take = told.take

        def slow(batch: Batch) -> None:
            inside.append(1)
            assert len(inside) == 1
            take(batch)
            inside.pop()

        told.take = slow  # type: ignore[method-assign]
        for number in range(500):
            write(f"{folder}/new-{number}", b"")
        await told.until(lambda: len([name for _, name in told.names if name.startswith(b"new-")]) == 500)

    run(watcher, main)


def test_more_than_can_be_held(folder: str, watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Becomes everything; and that once more, for what was on its way then."""
    monkeypatch.setattr(watch, "_MOST_PENDING", 10)
    monkeypatch.setattr(watch, "_REPEAT_S", 0.05)
    add(watcher, folder)
    for number in range(100):
        write(f"{folder}/new-{number}", b"")

    async def main(told: Told) -> None:
        await told.until(lambda: sum(batch.everything for batch in told.batches) == 2)

    run(watcher, main)
    assert watcher.overflows >= 1


def test_the_kernels_own_overflow(folder: str, watcher: Watcher) -> None:
    add(watcher, folder)

    async def main(told: Told) -> None:
        with watcher._lock:
            watcher._note(-1, linux.IN_Q_OVERFLOW, b"")
        write(f"{folder}/wakes-it", b"")
        await told.until(lambda: any(batch.everything for batch in told.batches))

    run(watcher, main)


def test_a_most_of_folders(tmp_path: Path) -> None:
    watcher = Watcher(str(tmp_path), most=2)
    try:
        for number in range(4):
            os.mkdir(f"{tmp_path}/{number}")
            assert add(watcher, f"{tmp_path}/{number}", bytes([number])) is (number < 2)
        assert watcher.refused() == {"more than 2 folders": 2}
        watcher.remove(b"\0")
        assert add(watcher, f"{tmp_path}/3", b"\3")
        assert watcher.refused() == {"more than 2 folders": 1}
        assert len(watcher) == 2
    finally:
        watcher.close()


def test_the_systems_limit_is_not_asked_again_and_again(
    folder: str, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full(*arguments: int) -> int:
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(linux, "inotify_add", full)
    for number in range(5):
        os.mkdir(f"{folder}/{number}")
        assert not add(watcher, f"{folder}/{number}", bytes([number]))
    assert len(calls) == 1
    assert watcher.refused() == {"fs.inotify.max_user_watches": 5}


def test_a_watch_that_is_not_permitted(folder: str, watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(linux, "inotify_add", denied)
    assert not add(watcher, folder)
    assert watcher.refused() == {"Permission denied": 1}


def test_removing_twice_and_after_its_end(folder: str, watcher: Watcher) -> None:
    add(watcher, folder)
    watcher.remove(KEY)
    watcher.remove(KEY)
    assert KEY not in watcher
    entry = os.stat(folder)
    assert watcher.key_of((entry.st_dev, entry.st_ino)) is None
    assert add(watcher, folder)
    assert watcher.key_of((entry.st_dev, entry.st_ino)) == KEY


def test_it_ends_while_events_come(folder: str) -> None:
    watcher = Watcher(folder)
    add(watcher, folder)
    before: queue.SimpleQueue[Batch] = queue.SimpleQueue()

    async def main() -> None:
        watcher.start(before.put, trio.lowlevel.current_trio_token())
        write(f"{folder}/new", b"")
        watcher.close()

    trio.run(main)


@pytest.mark.parametrize("where", ["its thread", "the trio thread"])
def test_a_failure_ends_all_watches(
    folder: str, watcher: Watcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """And says that everything may have changed: silence would be taken for truth."""
    add(watcher, folder)

    async def main(told: Told) -> None:
        if where == "its thread":
            monkeypatch.setattr(watcher, "_note", None)
        else:
            take = told.take

            def fails_once(batch: Batch) -> None:
                told.take = take  # type: ignore[method-assign]
                take(batch)
                if not batch.everything:
                    raise ValueError("a bug")

            monkeypatch.setattr(told, "take", fails_once)
        write(f"{folder}/new", b"")
        await told.until(lambda: any(batch.everything for batch in told.batches))

    async def started() -> None:
        told = Told()
        watcher.start(lambda batch: told.take(batch), trio.lowlevel.current_trio_token())
        await main(told)

    trio.run(started)
    assert len(watcher) == 0
    assert not add(watcher, folder)
    assert "not watched any more" in caplog.text
