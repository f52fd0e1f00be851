"""What the store refuses, and that nothing has changed when it does."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from checkpoint import machine, nvml, shelf
from checkpoint import store as rooms
from checkpoint.criu import Criu
from checkpoint.errors import CheckpointError, CorruptError, CudaError, MisfitError, RetryError, SnapshotNameError
from checkpoint.fingerprint import Gpu
from checkpoint.locking import flock
from checkpoint.manifest import MOST_BYTES
from checkpoint.nvml import Device
from checkpoint.store import Draft, Store
from tests.helpers.snapshots import add, manifest_of
from weightfs import linux


@pytest.fixture
def here(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "snapshots"))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", ".draft.x", "-x", "x" * 129, "a\n", "ä", "a b", "a\0"])
def test_names_that_are_none(here: Store, name: str) -> None:
    for ask in (here.begin, here.open, here.remove, here.verify, lambda one: here.lock(one).__enter__()):
        with pytest.raises(SnapshotNameError, match="can't be a snapshot's name"):
            ask(name)
    assert not os.path.exists(here.path)


def test_what_is_not_there(here: Store) -> None:
    assert here.list() == ()
    assert here.recover() == ()
    for ask in (here.open, here.verify, here.remove, lambda one: here.lock(one).__enter__()):
        with pytest.raises(SnapshotNameError, match="no snapshot"):
            ask("warm")
    add(here, "other")
    with pytest.raises(SnapshotNameError, match="no snapshot"):
        here.remove("warm")


def test_a_draft_that_is_left_is_abandoned(here: Store) -> None:
    with here.begin("warm") as draft:
        assert os.listdir(draft.folder) == ["images"]
        assert os.stat(draft.folder).st_mode & 0o777 == 0o700
    assert os.listdir(here.path) == []


def test_the_manifest_is_of_the_draft(here: Store) -> None:
    with here.begin("warm") as draft:
        said = manifest_of(draft)
        for wrong in (msgspec.structs.replace(said, name="other"), msgspec.structs.replace(said, id="0" * 32)):
            with pytest.raises(ValueError, match="not of warm"):
                draft.commit(wrong)
        draft.commit(said)


def make_folder(path: str) -> None:
    os.mkdir(os.path.join(path, "sub"))


def make_symlink(path: str) -> None:
    os.symlink("/etc/passwd", os.path.join(path, "parent"))


def make_fifo(path: str) -> None:
    os.mkfifo(os.path.join(path, "fifo"))


def make_strange(path: str) -> None:
    Path(path, "a\nb").touch()


@pytest.mark.parametrize("make", [make_folder, make_symlink, make_fifo, make_strange])
def test_images_that_are_no_plain_files(here: Store, make: Callable[[str], None]) -> None:
    with here.begin("warm") as draft:
        make(draft.images)
        with pytest.raises(CheckpointError, match="no plain file"):
            draft.commit(manifest_of(draft))
    assert os.listdir(here.path) == []


def test_images_are_closed_to_others_whatever_criu_made_them(here: Store) -> None:
    with here.begin("warm") as draft:
        path = Path(draft.images, "core-1.img")
        path.touch()
        path.chmod(0o666)
        made = draft.commit(manifest_of(draft))
    assert os.stat(os.path.join(made.images, "core-1.img")).st_mode & 0o777 == 0o600
    here.verify("warm")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_is_full(here: Store, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with here.begin("warm") as draft:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(CheckpointError, match="No space left") as raised:
                draft.commit(manifest_of(draft))
        assert raised.value.exit_code == 1
        assert here.list() == ()
    add(here, "warm")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(CheckpointError, match="No space left"):
            here.remove("warm")
    here.verify("warm")


def test_a_store_that_can_not_be_made(here: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        with pytest.raises(CheckpointError, match="No space left"):
            here.begin("warm")
    add(here, "other")
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        with pytest.raises(CheckpointError, match="No space left"):
            here.begin("warm")
    assert os.listdir(here.path) == ["other"]
    file = os.path.join(here.path, "file")
    Path(file).touch()
    with pytest.raises(CheckpointError):
        Store(file).begin("warm")
    with pytest.raises(CheckpointError):
        Store(file).list()


def test_a_filesystem_that_can_not_exchange_keeps_the_old_one(here: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    old = add(here, "warm")

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(linux, "exchange", refuse)
    with here.begin("warm", replace=True) as draft, pytest.raises(MisfitError, match="at once"):
        draft.commit(manifest_of(draft))
    assert here.verify("warm") == old
    assert os.listdir(here.path) == ["warm"]


def test_what_is_in_use_is_not_replaced(here: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "_IN_USE_S", 0.0)
    old = add(here, "warm")
    with here.lock("warm", shared=True):
        with pytest.raises(RetryError, match="in use"):
            here.begin("warm", replace=True)
        assert here.verify("warm") == old
    assert os.listdir(here.path) == ["warm"]


def test_nobody_uses_what_is_about_to_be_replaced(here: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whoever has stopped a process for the new one waits for nobody."""
    add(here, "warm")
    with here.begin("warm", replace=True) as draft:
        for ask in (here.verify, here.remove):
            with pytest.raises(RetryError, match="in use"):
                ask("warm")
        with pytest.raises(RetryError, match="being made"):  # at once
            here.begin("warm", replace=True)
        made = draft.commit(manifest_of(draft))
        assert here.verify("warm") == made
    with here.begin("warm", replace=True), pytest.raises(RetryError):
        here.verify("warm")
    assert here.verify("warm") == made, "what was given up holds nothing"


def made_meanwhile(here: Store, draft: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let somebody else take the draft's name just before the draft gets it."""
    locked = Store._locked

    def late(self: Store) -> object:
        monkeypatch.setattr(Store, "_locked", locked)
        add(here, "other")
        os.rename(os.path.join(here.path, "other"), os.path.join(here.path, draft.name))
        return locked(self)

    monkeypatch.setattr(Store, "_locked", late)


def test_a_name_that_is_taken_meanwhile(here: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with here.begin("warm") as draft:
        made_meanwhile(here, draft, monkeypatch)
        with pytest.raises(SnapshotNameError, match="already"):
            draft.commit(manifest_of(draft))
    assert os.listdir(here.path) == ["warm"]
    here.remove("warm")
    with here.begin("warm", replace=True) as draft:
        made_meanwhile(here, draft, monkeypatch)
        made = draft.commit(manifest_of(draft))
    assert here.verify("warm") == made


def test_a_snapshot_that_is_replaced_while_its_lock_is_waited_for(here: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add(here, "warm")
    calls = []

    def late(fd: int, how: int, until: float) -> bool:
        calls.append(fd)
        if len(calls) == 1:
            os.rename(os.path.join(here.path, "warm"), os.path.join(here.path, ".removed.warm.1"))
            monkeypatch.setattr(shelf, "flock", flock)
            add(here, "warm", generation=2)
        return flock(fd, how, until)

    monkeypatch.setattr(shelf, "flock", late)
    with here.lock("warm", shared=True):
        assert here.open("warm").manifest.generation == 2
        with pytest.raises(RetryError):
            here.remove("warm")


def test_a_store_that_somebody_holds(here: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_STORE_S", 0.05)
    add(here, "warm")
    fd = os.open(here.path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(RetryError, match="locked by another process"):
            here.begin("cold")
    finally:
        os.close(fd)
    here.begin("cold").abandon()


def test_what_is_no_snapshot_of_ours_is_left_alone(here: Store) -> None:
    add(here, "warm")
    Path(here.path, "lost+found").mkdir()
    Path(here.path, "file").touch()
    Path(here.path, ".hidden").mkdir()
    assert [(one.name, one.fault is None) for one in here.list()] == [("file", False), ("warm", True)]
    assert here.recover() == ()
    with pytest.raises(CorruptError), here.lock("file"):
        pass


def test_a_manifest_too_large_for_one(here: Store) -> None:
    made = add(here, "warm")
    os.truncate(os.path.join(made.folder, "manifest.json"), MOST_BYTES + 1)
    with pytest.raises(CorruptError, match="too large"):
        here.open("warm")


def test_what_of_this_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(uuid="GPU-1", name="NVIDIA H200", total_bytes=7, free_bytes=1, used_bytes={}, mig=False)

    class Driver:
        def driver_version(self) -> str:
            return "580.1"

        def devices(self) -> tuple[Device, ...]:
            return (device,)

    monkeypatch.setattr(machine, "Nvml", Driver)
    found = machine.fingerprint_here(criu=Criu(path="/criu", version=(4, 1, 1), libdir="/empty"), command=["serve"])
    assert (found.criu, found.driver) == ("4.1.1", "580.1")
    assert found.gpus == [Gpu(model="NVIDIA H200", memory_bytes=7)]

    def missing() -> nvml.Nvml:
        raise CudaError("no library")

    monkeypatch.setattr(machine, "Nvml", missing)
    assert machine.gpus_here() == (None, ())
