"""The scheduler over a shelf of real files: what a source that fails or stands still may cost."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from prefetch.occupancy import Key, Occupancy, Wanted
from prefetch.scheduler import Scheduler, SchedulerConfig
from prefetch.wishes import is_trigger
from weightfs.formats.layout import Role, TensorExtent, WeightLayout

SIZE = 1 << 20
SOON_S = 10.0


@dataclass
class Model:
    folder: bytes
    name: str
    layout: WeightLayout
    fds: dict[str, int]
    sizes: dict[str, int]
    keys: set[tuple[int, int]]

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()


@dataclass
class FakeShelf:
    """Every path is a model of one file; `before` is called by each opening."""

    place: Path
    before: Callable[[], None] = lambda: None
    made: list[Model] = field(default_factory=list)

    def names(self, path: bytes) -> list[Key]:
        return [(path, "model")]

    def open(self, folder: bytes, name: str) -> Model | None:
        self.before()
        path = self.place / os.fsdecode(folder)
        if not path.exists():
            path.write_bytes(bytes(SIZE))
        tensor = TensorExtent("model.layers.0.a", "U8", (SIZE,), "f", 0, SIZE, 0, Role.BLOCK)
        fd = os.open(path, os.O_RDONLY)
        made = Model(folder, name, WeightLayout("safetensors", ("f",), (tensor,)), {"f": fd}, {"f": SIZE}, set())
        self.made.append(made)
        return made


def all_closed(shelf: FakeShelf) -> bool:
    return not any(model.fds for model in shelf.made)


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_names_that_begin_a_plan() -> None:
    for name in ("config.json", "tokenizer.json", "vocab.txt", "model.safetensors", "a.gguf", "x.index.json"):
        assert is_trigger(b"folder/" + name.encode())
    for name in ("README.md", "model.bin", ".gitattributes", "my_config.json.bak"):
        assert not is_trigger(b"folder/" + name.encode())


def test_descriptors_are_given_back_when_a_plan_fails(tmp_path: Path) -> None:
    def broken(folder: bytes, files: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    shelf = FakeShelf(tmp_path)
    scheduler = Scheduler(shelf, SchedulerConfig(learned=broken))
    assert scheduler.warm(b"a", None) == []
    assert all_closed(shelf)
    assert scheduler.status()["wanted"] == 0


def test_a_model_is_read_and_its_descriptors_given_back(tmp_path: Path) -> None:
    shelf = FakeShelf(tmp_path)
    scheduler = Scheduler(shelf, SchedulerConfig())
    assert [one["bytes"] for one in scheduler.warm(b"a", None)] == [SIZE]
    wait_for(lambda: not scheduler.progress(["a/model"])[0]["active"])
    assert scheduler.progress(["a/model"])[0]["failure"] is None
    assert all_closed(shelf)


def test_the_state_is_told_while_the_source_stands_still(tmp_path: Path) -> None:
    shelf, let_go = FakeShelf(tmp_path), threading.Event()
    scheduler = Scheduler(shelf, SchedulerConfig())
    scheduler.warm(b"a", None)
    wait_for(lambda: not scheduler.progress(["a/model"])[0]["active"])

    def stand_still() -> None:
        let_go.wait(SOON_S)

    shelf.before = stand_still
    started = time.monotonic()
    for _ in range(5):
        assert scheduler.status()["models"] == []
    assert time.monotonic() - started < 2, "one of them waits, and not for long"
    shelf.before = lambda: None
    let_go.set()
    wait_for(lambda: [one["bytes"] for one in scheduler.status()["models"]] == [SIZE])
    wait_for(lambda: all_closed(shelf))


@pytest.mark.parametrize("reserved", [0, SIZE])
def test_what_is_being_read_keeps_its_room(tmp_path: Path, reserved: int) -> None:
    shelf = FakeShelf(tmp_path)
    model = shelf.open(b"a", "model")
    assert model is not None
    os.fsync(model.fds["f"])
    os.pread(model.fds["f"], SIZE, 0)
    model.close()
    occupancy = Occupancy(shelf, SIZE + SIZE // 2, ())
    left = occupancy.make_room(SIZE, [Wanted((b"a", "model"), 1.0, reserved)])
    assert left == (SIZE // 2 if reserved else SIZE)
    assert (occupancy.evicted_bytes > 0) is (reserved == 0)
    assert all_closed(shelf)
