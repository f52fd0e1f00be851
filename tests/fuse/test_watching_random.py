"""Changes of all kinds at random, beside readers that make the kernel remember whatever it can at every moment.

Once the source rests, the mount shows just what is there: nothing that was on its way to the kernel when it changed is
believed for longer than what nobody watches.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest

from tests.fuse.test_changes import read
from tests.fuse.test_watching import facts, walk
from tests.helpers.models import write
from tests.helpers.mounting import Mount, Mounter, both_engines, wait_until

ROUNDS, BUSY_S, REST_S = 4, 0.7, 2.5
"""What has two names, or is new to the index, is believed for 1 s."""
FOLDERS = ("", "a/", "b/", "a/c/")
NAMES = ("one", "two", "three", "four")
GONE = frozenset({errno.ENOENT, errno.ESTALE, errno.ENOTDIR, errno.ELOOP, errno.EACCES})


class Changer:
    """Does one thing after another to a source; a thing that can't be done is left out."""

    def __init__(self, root: str, chosen: random.Random) -> None:
        self._root = root
        self._chosen = chosen

    def _path(self) -> str:
        return f"{self._root}/{self._chosen.choice(FOLDERS)}{self._chosen.choice(NAMES)}"

    def _folder(self) -> str:
        return f"{self._root}/{self._chosen.choice(FOLDERS[1:])}".rstrip("/")

    def act(self) -> None:
        acts = (
            self.create, self.create, self.append, self.append, self.truncate, self.replace, self.rename, self.link,
            self.remove, self.chmod, self.symlink, self.move_folder, self.new_folder, self.remove_folder,
        )  # fmt: skip
        with contextlib.suppress(OSError):
            self._chosen.choice(acts)()

    def create(self) -> None:
        write(self._path(), self._chosen.randbytes(self._chosen.randrange(200)))

    def append(self) -> None:
        fd = os.open(self._path(), os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"more")
        os.close(fd)

    def truncate(self) -> None:
        os.truncate(self._path(), self._chosen.randrange(100))

    def replace(self) -> None:
        path = write(f"{self._root}/.new", self._chosen.randbytes(self._chosen.randrange(200)))
        os.rename(path, self._path())

    def rename(self) -> None:
        os.rename(self._path(), self._path())

    def link(self) -> None:
        os.link(self._path(), self._path(), follow_symlinks=False)

    def remove(self) -> None:
        os.unlink(self._path())

    def chmod(self) -> None:
        os.chmod(self._path(), self._chosen.choice((0o600, 0o644)))

    def symlink(self) -> None:
        os.symlink(self._chosen.choice(NAMES), self._path())

    def move_folder(self) -> None:
        os.rename(self._folder(), self._folder())

    def new_folder(self) -> None:
        os.makedirs(self._folder())

    def remove_folder(self) -> None:
        if self._chosen.random() < 0.3:
            shutil.rmtree(self._folder())


def differences(mount: Mount) -> dict[str, object]:
    """By path what the mount and the source show, where that is not the same."""
    try:
        shown, there = walk(mount.mountpoint), walk(mount.source)
    except OSError as e:
        return {"walk": e}
    both = {path: (shown.get(path), there.get(path)) for path in shown.keys() | there.keys()}
    return {
        path: (a and facts(a), b and facts(b))
        for path, (a, b) in both.items()
        if not a or not b or facts(a) != facts(b)
    }


@both_engines
@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_shown_in_the_end(tmp_path: Path, mounter: Mounter, engine: str, seed: int) -> None:
    source = f"{tmp_path}/source"
    for folder in FOLDERS:
        for name in NAMES:
            write(f"{source}/{folder}{name}", name.encode())
    mount = mounter(source, engine)
    changer = Changer(source, random.Random(seed))
    busy, stop, faults = threading.Event(), threading.Event(), list[OSError]()

    def look(number: int) -> None:
        chosen = random.Random(number)
        while not stop.is_set():
            busy.wait()
            path = mount.path(chosen.choice(FOLDERS), chosen.choice(NAMES))
            try:
                if number == 0:
                    walk(mount.mountpoint)
                elif chosen.random() < 0.5:
                    os.stat(path)
                else:
                    read(path)
            except OSError as e:
                if e.errno not in GONE:
                    faults.append(e)

    threads = [threading.Thread(target=look, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(ROUNDS):
            busy.set()
            ends = time.monotonic() + BUSY_S
            while time.monotonic() < ends:
                changer.act()
                time.sleep(changer._chosen.choice((0, 0, 0.001, 0.01)))
            busy.clear()
            left: dict[str, object] = {}

            def is_same() -> bool:
                left.clear()
                left.update(differences(mount))
                return not left

            try:
                wait_until(is_same, "the source's", timeout_s=REST_S)
            except AssertionError:
                raise AssertionError(f"still old: {left}") from None
            for path, entry in walk(source).items():
                if os.path.isfile(f"{source}/{path}") and not os.path.islink(f"{source}/{path}"):
                    assert read(mount.path(path)) == read(f"{source}/{path}"), (path, entry)
    finally:
        stop.set()
        busy.set()
        for thread in threads:
            thread.join(20)
    assert not faults, faults[:3]
