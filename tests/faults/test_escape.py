"""Ways out of the source, tried on a real mount: renames while files are opened, bind mounts, magic links, names."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.models import Tensor, every_dtype, safetensors_bytes, write, write_safetensors
from tests.helpers.mounting import Mount, Mounter, both_engines, errno_from, refused, wait_until, weightfs

INSIDE, MARKER = b"inside", b"SECRET-OF-ANOTHER-FOLDER"
RACE_S = 3.0
RACE_AT_MOST_S = 60.0
ENOUGH = 20
"""Of reads that went well, and of those refused, by one thread."""


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@contextlib.contextmanager
def taking_turns(name: str, other: str) -> Iterator[None]:
    """A thread that renames `other` to `name` and back, over and over, while the block lasts."""
    stop = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.is_set():
                os.rename(name, f"{name}-spare")
                os.rename(other, name)
                os.rename(name, other)
                os.rename(f"{name}-spare", name)
        except BaseException as e:  # noqa: BLE001 - raised again below
            failed.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def count_reads(paths: list[str]) -> tuple[int, int]:
    """Read these in turn from three threads, for a while and until enough was seen of both outcomes.

    Gives how many reads went well and how many were refused.
    """
    began = time.monotonic()
    counts: list[tuple[int, int]] = []
    wrong: list[str] = []

    def run() -> None:
        done = 0
        turned_away = 0
        while (past_s := time.monotonic() - began) < RACE_AT_MOST_S and (
            past_s < RACE_S or min(done, turned_away) <= ENOUGH
        ):
            for path in paths:
                try:
                    content = read(path)
                except OSError as e:
                    if e.errno not in (errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE):
                        wrong.append(f"{path}: {e}")
                    turned_away += 1
                    continue
                if MARKER in content or not content.startswith(INSIDE):
                    wrong.append(f"{path}: {content[:40]!r}")
                done += 1
        counts.append((done, turned_away))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:5]
    return sum(done for done, _ in counts), sum(turned_away for _, turned_away in counts)


@both_engines
def test_a_folder_and_a_link_out_that_take_turns(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """Readers of one name, under which lie a folder and a symlink to another place in turn."""
    source, outside = f"{tmp_path}/source", f"{tmp_path}/outside"
    tensors = every_dtype()
    for folder, first in ((f"{source}/a", INSIDE), (outside, MARKER)):
        write(f"{folder}/file", first + os.path.basename(folder).encode())
        tensors["first"] = Tensor("U8", (len(first),), first)
        write_safetensors(f"{folder}/model.safetensors", tensors)
    os.symlink(outside, f"{source}/out")
    mount = mounter(source, engine)
    with taking_turns(f"{source}/a", f"{source}/out"):
        done, turned_away = count_reads([mount.path("a/file"), mount.path("a/.tensors/model/first")])
    assert min(done, turned_away) > ENOUGH
    wait_until(lambda: read(mount.path("a/.tensors/model/first")) == INSIDE, "the folder is back")


@both_engines
def test_a_file_and_a_link_out_that_take_turns(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    source = f"{tmp_path}/source"
    write(f"{source}/file", INSIDE)
    write(f"{tmp_path}/outside/secret", MARKER)
    os.symlink("../outside/secret", f"{source}/out")
    mount = mounter(source, engine)
    with taking_turns(f"{source}/file", f"{source}/out"):
        done, turned_away = count_reads([mount.path("file")])
    assert min(done, turned_away) > ENOUGH


@both_engines
def test_a_link_that_comes_to_lead_out_is_not_followed(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """Its folder moves up, or a folder it goes over becomes a link: what it said before may not be believed."""
    source = f"{tmp_path}/source"
    write(f"{source}/deep/below/file", INSIDE)
    write(f"{source}/x", INSIDE)
    os.symlink("../../x", f"{source}/deep/below/moved")
    os.mkdir(f"{source}/over")
    os.symlink("over/../x", f"{source}/sly")
    mountpoint = f"{tmp_path}/mountpoints/models"
    os.makedirs(mountpoint)
    for outside in (f"{tmp_path}/x", f"{tmp_path}/mountpoints/x"):
        write(outside, MARKER)
    mount = mounter(source, engine, at=mountpoint)
    assert read(mount.path("deep/below/moved")) == read(mount.path("sly")) == INSIDE
    os.rename(f"{source}/deep/below", f"{source}/below")
    os.rmdir(f"{source}/over")
    os.symlink(".", f"{source}/over")
    for name in ("below/moved", "sly"):
        wait_until(
            lambda name=name: errno_from(lambda: read(mount.path(name))) == errno.EACCES,  # type: ignore[misc]
            f"{name} leads out",
            timeout_s=20,
        )


@contextlib.contextmanager
def bound(what: str, where: str) -> Iterator[None]:
    os.makedirs(where, exist_ok=True)
    subprocess.run(["mount", "--bind", what, where], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


@both_engines
def test_what_is_bound_into_the_source_is_part_of_it(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """As on the bare folder. Whoever may mount there may decide what the source shows; the mount adds nothing to it."""
    source, elsewhere = f"{tmp_path}/source", f"{tmp_path}/elsewhere"
    write(f"{source}/file", INSIDE)
    write(f"{elsewhere}/models/file", INSIDE + b" bound")
    write(f"{elsewhere}/secret", MARKER)
    write_safetensors(f"{elsewhere}/models/model.safetensors", every_dtype())
    os.symlink("../secret", f"{elsewhere}/models/link")
    with bound(f"{elsewhere}/models", f"{source}/bound"):
        mount = mounter(source, engine)
        assert read(mount.path("bound/file")) == INSIDE + b" bound"
        assert read(mount.path("bound/.tensors/model/t.U8")) == every_dtype()["t.U8"].data
        assert sorted(os.listdir(mount.path("bound"))) == ["file", "link", "model.safetensors"]
        # `..` of a bound folder is where it is bound, and its links are judged from there.
        assert errno_from(lambda: read(mount.path("bound/link"))) == errno.ENOENT
        assert os.path.samefile(mount.path("bound/.."), mount.mountpoint)
    wait_until(lambda: os.listdir(mount.path("bound")) == [], "what was bound is gone")


@both_engines
def test_magic_links_lead_nowhere(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """/proc bound into the source: its links jump to open files and roots of processes whatever they say."""
    source = f"{tmp_path}/source"
    secret = write(f"{tmp_path}/outside/secret", MARKER)
    write(f"{source}/file", INSIDE)
    with open(secret, "rb") as held, bound(f"/proc/{os.getpid()}", f"{source}/process"):
        mount = mounter(source, engine)
        for path in (f"fd/{held.fileno()}", "root/etc/hostname", "cwd/pyproject.toml", "exe"):
            with refused(errno.EACCES, errno.ENOENT, errno.ESTALE):
                read(mount.path("process", path))
        assert read(mount.path("file")) == INSIDE
        mount.umount()


HOSTILE_NAMES = (
    b"new\nline",
    b"\x1b[31mred\x1b]0;title\x07",
    b"\xff\xfe",
    b"-rf",
    b"%2F..%2F",
    b"~",
    b"n" * 255,
    b"...",
)


@both_engines
def test_hostile_names_reach_no_terminal_and_no_other_file(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """Folders of such names with models in them, one faulty: files, views, ls, verify and status."""
    source = os.fsencode(tmp_path / "source")
    data = safetensors_bytes(every_dtype())
    for name in HOSTILE_NAMES:
        os.makedirs(source + b"/" + name)
        for file, content in ((b"model.safetensors", data), (b"faulty.safetensors", data[:-1])):
            with open(b"/".join((source, name, file)), "wb") as made:
                made.write(content)
    mount = mounter(os.fsdecode(source), engine)
    assert sorted(os.listdir(os.fsencode(mount.mountpoint))) == sorted(HOSTILE_NAMES)
    for name in HOSTILE_NAMES:
        folder = os.path.join(os.fsencode(mount.mountpoint), name)
        assert read(os.fsdecode(folder + b"/model.safetensors")) == data
        assert read(os.fsdecode(folder + b"/.tensors/model/t.U8")) == every_dtype()["t.U8"].data
        assert errno_from(lambda folder=folder: os.stat(folder + b"/.tensors/faulty/t.U8")) == errno.ENOENT  # type: ignore[misc]
    printed = [
        weightfs("verify", os.fsdecode(source)),
        weightfs("status", mount.mountpoint),
        *(weightfs("ls", os.fsdecode(source + b"/" + name + b"/model.safetensors")) for name in HOSTILE_NAMES),
    ]
    assert [done.returncode for done in printed] == [4, *[0] * (len(printed) - 1)]
    for done in printed:
        assert not set(done.stdout + done.stderr) & set("\x1b\x07\r\udcff")
    assert len(mount.live()["faults"]) == len(HOSTILE_NAMES)


@pytest.mark.parametrize("name", ["..", ".", "../outside/secret", "a/../../outside/secret", "/etc/passwd", "%2e%2e"])
def test_names_of_tensors_and_sets_lead_nowhere(tmp_path: Path, mounter: Mounter, name: str) -> None:
    """A header may call its tensors what it likes; each is one entry below its own set."""
    tensors = {name: every_dtype()["t.U8"]}
    write_safetensors(f"{tmp_path}/source/model.safetensors", tensors)
    write(f"{tmp_path}/outside/secret", MARKER)
    mount: Mount = mounter(f"{tmp_path}/source")
    (entry,) = os.listdir(mount.path(".tensors/model"))
    assert "/" not in entry
    assert entry not in (".", "..")
    assert read(mount.path(".tensors/model", entry)) == tensors[name].data
