"""Readers of every kind beside a source that never rests: each sees one content, whole, or hears that it is gone."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.models import Tensor, write, write_safetensors
from tests.helpers.mounting import Mount, Mounter, both_engines, wait_until

SECONDS = 3.0
GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)


class Churn:
    """Threads that run until the time is over; what any of them raises fails the test."""

    def __init__(self) -> None:
        self.ends = time.monotonic() + SECONDS
        self.faults: list[BaseException] = []
        self.turns: dict[str, int] = {}
        self.gone = 0
        self._threads: list[threading.Thread] = []

    def start(self, turn: Callable[[random.Random], None], name: str) -> None:
        def run() -> None:
            chosen, turns = random.Random(name), 0
            try:
                while time.monotonic() < self.ends and not self.faults:
                    try:
                        turn(chosen)
                    except OSError as e:
                        if e.errno not in GONE:
                            raise
                        self.gone += 1
                    else:
                        turns += 1
            except BaseException as e:  # noqa: BLE001 - the test's own thread raises it
                self.faults.append(e)
            self.turns[name] = turns

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def finish(self) -> None:
        for thread in self._threads:
            thread.join(SECONDS + 20)
            assert not thread.is_alive(), "a thread hangs"
        if self.faults:
            raise self.faults[0]


def content(number: int) -> bytes:
    """Tells its own length and is of one byte, so that a mixture shows."""
    return bytes([number % 251]) * (20_000 + number % 251)


def check(data: bytes) -> None:
    assert len(set(data)) == 1
    assert len(data) == 20_000 + data[0]


def whole(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def start_readers(churn: Churn, mount: Mount) -> None:
    def opened(chosen: random.Random, path: str) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            # A view that was mapped when its file changed raises SIGBUS: no errno can be told through a mapping.
            if ".tensors" not in path and chosen.random() < 0.3:
                with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
                    check(mapped[:])
            check(whole(fd))
        finally:
            os.close(fd)

    def plain(chosen: random.Random) -> None:
        opened(chosen, mount.path(f"file-{chosen.randrange(8)}"))

    def view(chosen: random.Random) -> None:
        opened(chosen, mount.path(f".tensors/set-{chosen.randrange(4)}/t"))

    def listing(chosen: random.Random) -> None:
        names = os.listdir(mount.path(chosen.choice(["", "folder", ".tensors"])))
        assert len(set(names)) == len(names)

    def asking(chosen: random.Random) -> None:
        path = mount.path(chosen.choice(["file-1", "folder", "folder/a", ".tensors/set-1/t", "absent", "link"]))
        os.lstat(path)
        if chosen.random() < 0.2:
            os.listxattr(path)

    for kind, count in ((plain, 2), (view, 2), (listing, 1), (asking, 1)):
        for number in range(count):
            churn.start(kind, f"{kind.__name__}-{number}")


@both_engines
def test_readers_beside_a_source_that_changes(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    source, outside = f"{tmp_path}/source", f"{tmp_path}/outside"
    os.makedirs(f"{source}/folder")
    os.mkdir(outside)

    def replace(chosen: random.Random) -> None:
        """Whole files appear under their names by rename, as downloads do."""
        number, data = chosen.randrange(8), content(chosen.randrange(251))
        if chosen.random() < 0.5:
            os.rename(write(f"{outside}/file", data), f"{source}/file-{number}")
        else:
            os.rename(
                write_safetensors(f"{outside}/set", {"t": Tensor("U8", (len(data),), data)}),
                f"{source}/set-{number % 4}.safetensors",
            )
        if chosen.random() < 0.1:
            os.unlink(f"{source}/file-{chosen.randrange(8)}")

    def shuffle(chosen: random.Random) -> None:
        write(f"{source}/folder/{chosen.choice('abc')}", b"x")
        os.rename(f"{source}/folder/{chosen.choice('abc')}", f"{source}/folder/{chosen.choice('abc')}")
        if chosen.random() < 0.1:
            os.rename(f"{source}/folder", f"{source}/moved")
            os.rename(f"{source}/moved", f"{source}/folder")
        os.symlink(f"file-{chosen.randrange(8)}", f"{source}/.new-link")
        os.rename(f"{source}/.new-link", f"{source}/link")

    for number in range(8):
        write(f"{source}/file-{number}", content(number))
    for number in range(4):
        data = content(number)
        write_safetensors(f"{source}/set-{number}.safetensors", {"t": Tensor("U8", (len(data),), data)})
    mount = mounter(source, engine)
    churn = Churn()
    start_readers(churn, mount)
    churn.start(replace, "replace")
    churn.start(shuffle, "shuffle")
    churn.finish()

    assert all(turns > 20 for turns in churn.turns.values()), churn.turns
    state = mount.live()
    assert state["requests_expired"] == 0
    wait_until(lambda: mount.live()["open_inodes"] == 1, "handles are given back")
    assert len(os.listdir(f"/proc/{mount.daemon_pid()}/fd")) < 60
    # And when the source rests, the mount shows it as it is.
    for name in os.listdir(source):
        if name.startswith("file"):
            with open(f"{source}/{name}", "rb") as bare:
                expected = bare.read()
            wait_until(lambda n=name, e=expected: Path(mount.path(n)).read_bytes() == e, name)  # type: ignore[misc]
