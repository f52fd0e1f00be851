"""Indexing behind a mount that serves."""

from __future__ import annotations

import os
from pathlib import Path

from tests.helpers.libraries import make_library
from tests.helpers.mounting import Mount, Mounter, both_engines, wait_until, wait_until_settled


def indexed(mount: Mount) -> dict[str, object]:
    """The progress of the crawl, once it is done."""
    done = wait_until(lambda: (now := mount.live()["indexing"])["done"] and now, "indexing", timeout_s=30)
    assert done["failure"] is None
    return dict(done)


@both_engines
def test_a_folder_nobody_visited_is_in_the_index(engine: str, mounter: Mounter, tmp_path: Path) -> None:
    source = str(tmp_path / "library")
    folders = make_library(source, folders=3, files=6, tensors=60)
    wait_until_settled(*(entry.path for folder in folders for entry in os.scandir(folder)))
    state = str(tmp_path / "state")
    with mounter(source, engine, state_dir=state) as mount:
        done = indexed(mount)
        assert (done["folders"], done["files"], done["headers"]) == (4, 6, 6)
        assert mount.live()["headers_parsed"] == 0
        views = mount.path(os.path.basename(folders[1]), ".tensors", "model")
        numbers = {entry.name: entry.inode() for entry in os.scandir(views)}
        assert len(numbers) == 20
        with open(os.path.join(views, sorted(numbers)[0]), "rb") as tensor:
            assert tensor.read() == bytes(16 * 1024 * 2)
        status = mount.live()
        assert status["headers_parsed"] == 0, "the look-up had to read a header"
        assert status["index"]["set_aside"] is None
    with mounter(source, engine, state_dir=state) as mount:
        done = indexed(mount)
        assert (done["files"], done["headers"], done["dropped"]) == (6, 0, 0)
        views = mount.path(os.path.basename(folders[1]), ".tensors", "model")
        assert {entry.name: entry.inode() for entry in os.scandir(views)} == numbers


def test_what_is_gone_is_dropped_and_the_rest_keeps_its_numbers(mounter: Mounter, tmp_path: Path) -> None:
    source = str(tmp_path / "library")
    folders = make_library(source, folders=2, files=2, tensors=20)
    wait_until_settled(*(entry.path for folder in folders for entry in os.scandir(folder)))
    state = str(tmp_path / "state")
    with mounter(source, state_dir=state) as mount:
        indexed(mount)
        kept = os.stat(mount.path(os.path.basename(folders[1]), "model.safetensors")).st_ino
        os.stat(mount.path(os.path.basename(folders[0]), "model.safetensors"))
    for entry in os.scandir(folders[0]):
        os.unlink(entry.path)
    with mounter(source, state_dir=state) as mount:
        assert indexed(mount)["dropped"], "nothing was dropped"
        assert os.stat(mount.path(os.path.basename(folders[1]), "model.safetensors")).st_ino == kept
        assert os.listdir(mount.path(os.path.basename(folders[0]))) == []
