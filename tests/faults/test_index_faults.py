"""An index that was damaged, is another source's or goes away: said, set aside, and never a wrong byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from tests.helpers.models import Tensor, model_tensors, write, write_safetensors
from tests.helpers.mounting import Mount, Mounter, wait_until, wait_until_settled
from weightfs.formats import encode_name


def files_of(state: str) -> str:
    return os.path.join(state, "index.lmdb")


def check(mount: Mount, tensors: dict[str, Tensor]) -> None:
    """Everything reads right, whatever the index says."""
    with (
        open(mount.path("model.safetensors"), "rb") as mounted,
        open(f"{mount.source}/model.safetensors", "rb") as bare,
    ):
        assert mounted.read() == bare.read()
    assert set(os.listdir(mount.path(".tensors/model"))) == {encode_name(name) for name in tensors}
    for name, one in tensors.items():
        with open(mount.path(".tensors/model", encode_name(name)), "rb") as view:
            assert view.read() == one.data
    for number in range(50):
        with open(mount.path(f"folder/{number}"), "rb") as file:
            assert file.read() == str(number).encode()


TENSORS = model_tensors(40, rows=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("source"))
    for number in range(50):
        write(f"{root}/folder/{number}", str(number).encode())
    wait_until_settled(write_safetensors(f"{root}/model.safetensors", TENSORS))
    return root


@pytest.fixture(scope="module")
def good_state(source: str, tmp_path_factory: pytest.TempPathFactory, module_mounter: Mounter) -> str:
    folder = str(tmp_path_factory.mktemp("state"))
    with module_mounter(source, state_dir=folder) as mount:
        check(mount, TENSORS)
    return folder


@pytest.fixture
def state(good_state: str, tmp_path: Path) -> str:
    """The state folder of a mount that has ended."""
    return str(shutil.copytree(good_state, f"{tmp_path}/state"))


def overwrite(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def zero_a_page(path: str) -> None:
    """One that holds a record: a page that is free would be no damage."""
    with open(path, "r+b") as file:
        file.seek(file.read().rfind(b".weight") // 4096 * 4096)
        file.write(bytes(4096))


def garble_the_meta_pages(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(16)
        file.write(random.Random(1).randbytes(100))
        file.seek(4096 + 16)
        file.write(random.Random(2).randbytes(100))


def damage_records(path: str) -> None:
    """Change letters within the values of records; the pages stay as LMDB made them."""
    with open(path, "rb") as file:
        data = file.read()
    damaged = data.replace(b"self_attn.q_proj", b"self_attn.k_proj").replace(b"model.safetensors", b"mOdel.safetensors")
    assert damaged != data
    with open(path, "r+b") as file:  # in place, under the daemon's own mapping
        file.write(damaged)


def put_a_folder_there(path: str) -> None:
    os.unlink(path)
    os.mkdir(path)


DAMAGES: dict[str, Callable[[str], None]] = {
    "random bytes": lambda path: overwrite(path, random.Random(5).randbytes(100_000)),
    "zeros": lambda path: overwrite(path, bytes(100_000)),
    "empty": lambda path: overwrite(path, b""),
    "text": lambda path: overwrite(path, b"not an index\n"),
    "cut in half": lambda path: os.truncate(path, os.path.getsize(path) // 2),
    "cut to a page": lambda path: os.truncate(path, 4096),
    "a page zeroed": zero_a_page,
    "meta pages garbled": garble_the_meta_pages,
    "a folder in its place": put_a_folder_there,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_index_is_set_aside(source: str, state: str, mounter: Mounter, damage: str) -> None:
    DAMAGES[damage](files_of(state))
    with mounter(source, state_dir=state) as mount:
        check(mount, TENSORS)
        aside = mount.live()["index"]["set_aside"]
        if damage != "empty":  # an empty file is a new index
            assert aside is not None
            assert os.path.exists(aside[0])
            assert aside[1]
            assert mount.log_text().count("set aside") == 1
    with mounter(source, state_dir=state) as mount:  # said once, and the new one is good
        check(mount, TENSORS)
        assert mount.live()["index"]["set_aside"] is None
        assert mount.live()["headers_parsed"] == 0


@pytest.mark.parametrize("seed", range(5))
def test_any_page_garbled_gives_no_wrong_byte(source: str, state: str, mounter: Mounter, seed: int) -> None:
    """Damage that neither size nor modification time betrays."""
    path = files_of(state)
    stat, chosen = os.stat(path), random.Random(seed)
    with open(path, "r+b") as file:
        for _ in range(3):
            page = chosen.randrange(2, max(3, stat.st_size // 4096))
            file.seek(page * 4096 + chosen.randrange(16, 4000))
            file.write(chosen.randbytes(64))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with mounter(source, state_dir=state) as mount:
        mount.log_must_be_clean = False
        check(mount, TENSORS)


def test_foreign_index_is_set_aside(source: str, state: str, mounter: Mounter, tmp_path: Path) -> None:
    other = f"{tmp_path}/other"
    write(f"{other}/file", b"x")
    mount = mounter(other, state_dir=state)
    aside = mount.live()["index"]["set_aside"]
    assert source in aside[1]
    assert os.listdir(mount.mountpoint) == ["file"]


def test_new_index_has_larger_numbers(source: str, state: str, mounter: Mounter) -> None:
    with mounter(source, state_dir=state) as mount:
        before = {name: os.stat(mount.path("folder", name)).st_ino for name in os.listdir(mount.path("folder"))}
    overwrite(files_of(state), b"damaged" * 1000)
    with mounter(source, state_dir=state) as mount:
        after = {name: os.stat(mount.path("folder", name)).st_ino for name in os.listdir(mount.path("folder"))}
    assert min(after.values()) > max(before.values())


def test_killed_daemon_leaves_a_good_index(source: str, mounter: Mounter, tmp_path: Path) -> None:
    """SIGKILL at any moment: what was written stands, what was not is found again; no number is given out twice."""
    state, given = f"{tmp_path}/state", set[int]()
    for turn in range(4):
        mount = mounter(source, state_dir=state)
        assert mount.live()["index"]["set_aside"] is None
        check(mount, TENSORS)
        path = write(f"{source}/killed-{turn}", b"")
        number = os.stat(mount.path(f"killed-{turn}")).st_ino
        assert number not in given
        given.add(number)
        mount.supervisor.signal(signal.SIGKILL)
        assert mount.supervisor.has_ended(20)
        os.unlink(path)
        mount.__exit__(None, None, None)


def damage_every_record(path: str) -> None:
    """Through LMDB, as another process, so that its pages stay sound: values that fail their digest."""
    with lmdb.open(path, subdir=False, max_dbs=8) as env:
        for room in (b"keys", b"entries", b"files", b"bases"):
            handle = env.open_db(room, create=False)
            with env.begin(write=True, db=handle) as txn:
                for key, value in list(txn.cursor()):
                    txn.put(key, value[:-1] + bytes([value[-1] ^ 1]))


@pytest.mark.parametrize("how", ["folder deleted", "file deleted", "records damaged"])
def test_under_a_live_mount(source: str, state: str, mounter: Mounter, how: str) -> None:
    with mounter(source, state_dir=state) as mount:
        mount.log_must_be_clean = False
        check(mount, TENSORS)
        if how == "folder deleted":
            shutil.rmtree(state)
        elif how == "file deleted":
            os.unlink(files_of(state))
        else:
            damage_every_record(files_of(state))
        check(mount, TENSORS)
        write(f"{source}/late", b"late")
        try:
            wait_until(lambda: os.path.exists(mount.path("late")), "new file")
            with open(mount.path("late"), "rb") as file:
                assert file.read() == b"late"
            check(mount, TENSORS)
        finally:
            os.unlink(f"{source}/late")
    with mounter(source, state_dir=state) as mount:
        check(mount, TENSORS)


def test_state_folder_that_cannot_be_made(source: str, mounter: Mounter, tmp_path: Path) -> None:
    file = write(f"{tmp_path}/file", b"")
    with pytest.raises(AssertionError, match="--state-dir names another folder"):
        mounter(source, state_dir=f"{file}/state")
