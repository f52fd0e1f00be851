"""Indexing that is killed, by itself or with its daemon."""

from __future__ import annotations

import os
import select
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.helpers.libraries import make_library
from tests.helpers.mounting import Mounter, wait_until, wait_until_settled
from weightfs.handles import HandleTable
from weightfs.index.store import IndexStore
from weightfs.indexing import Indexer
from weightfs.source.local import LocalSource
from weightfs.tree import Tree

FILES, TENSORS = 600, 60_000


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("library"))
    folders = make_library(root, folders=60, files=FILES, tensors=TENSORS)
    wait_until_settled(*folders, *(entry.path for entry in os.scandir(folders[-1])))
    return root


def test_a_crawl_that_is_killed_goes_on_at_the_next(library: str, tmp_path: Path) -> None:
    source = LocalSource(library)
    state = str(tmp_path / "state")
    index = IndexStore(state, library)
    indexer = Indexer(source, index, HandleTable(), Tree(index, source.lstat(b"").inode_key))
    before = set(os.listdir("/proc/self/fd"))
    crawling = threading.Thread(target=indexer.crawl)
    crawling.start()
    wait_until(lambda: indexer.status()["headers"] > 50, "the first headers")
    assert indexer._process is not None
    indexer._process.send_signal(signal.SIGKILL)
    crawling.join(20)
    first = indexer.status()
    assert first["done"]
    assert first["failure"] == "the crawl ended before it was done"
    assert first["crawls"] == 0
    assert 50 < first["headers"] < FILES
    indexer.crawl()
    second = indexer.status()
    assert (second["files"], second["failure"], second["crawls"]) == (FILES, None, 1)
    assert second["headers"] == FILES - first["headers"], "what was recorded stays recorded"
    assert set(os.listdir("/proc/self/fd")) == before
    index.close()
    source.close()


def test_stopping_ends_the_process_and_lets_none_begin(library: str, tmp_path: Path) -> None:
    source = LocalSource(library)
    index = IndexStore(str(tmp_path / "state"), library)
    indexer = Indexer(source, index, HandleTable(), Tree(index, source.lstat(b"").inode_key))
    crawling = threading.Thread(target=indexer.crawl)
    crawling.start()
    wait_until(lambda: indexer.status()["headers"], "the first headers")
    indexer.stop()
    crawling.join(20)
    assert not crawling.is_alive()
    done = indexer.status()
    indexer.crawl()
    assert indexer.status()["headers"] <= done["headers"]
    index.close()
    source.close()


def test_run_crawls_again_when_asked_and_ends_with_its_process(library: str, tmp_path: Path) -> None:
    source = LocalSource(library)
    index = IndexStore(str(tmp_path / "state"), library)
    indexer = Indexer(source, index, HandleTable(), Tree(index, source.lstat(b"").inode_key))

    async def crawls(number: int) -> None:
        with trio.fail_after(60):
            while indexer.status()["crawls"] < number:  # noqa: ASYNC110 - what a user of `status` does
                await trio.sleep(0.01)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(indexer.run)
            await crawls(1)
            assert indexer.status()["headers"] == FILES
            indexer.again()
            await crawls(2)
            assert indexer.status()["headers"] == 0
            indexer.again()
            with trio.fail_after(10):
                while indexer._process is None:  # noqa: ASYNC110 - there is no event for it
                    await trio.sleep(0.001)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert indexer._process is None
    index.close()
    source.close()
    assert not children_of(os.getpid())


def test_the_folder_that_was_opened_is_crawled_whatever_its_path_means_now(tmp_path: Path) -> None:
    for name, files in (("a", 3), ("b", 1)):
        made = make_library(str(tmp_path / name), folders=1, files=files, tensors=files)
        wait_until_settled(*(entry.path for entry in os.scandir(made[0])))
    source = LocalSource(str(tmp_path / "a"))
    index = IndexStore(str(tmp_path / "state"), "a")
    indexer = Indexer(source, index, HandleTable(), Tree(index, source.lstat(b"").inode_key))
    os.rename(tmp_path / "a", tmp_path / "c")
    os.rename(tmp_path / "b", tmp_path / "a")
    indexer.crawl()
    assert (indexer.status()["failure"], indexer.status()["headers"]) == (None, 3)
    index.close()
    source.close()


def test_a_crawl_that_can_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    source = LocalSource(str(tmp_path / "a"))
    index = IndexStore(str(tmp_path / "state"), "a")
    indexer = Indexer(source, index, HandleTable(), Tree(index, source.lstat(b"").inode_key))
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", "/nonexistent/python")
        indexer.crawl()
    assert "/nonexistent/python" in indexer.status()["failure"]
    indexer.crawl()
    assert indexer.status()["failure"] is None
    index.close()
    source.close()


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as children:
            found += [int(child) for child in children.read().split()]
    return found


def test_a_daemon_killed_while_it_indexes(library: str, mounter: Mounter, tmp_path: Path) -> None:
    state = str(tmp_path / "state")

    def progress() -> dict[str, Any]:
        return dict(mount.live()["indexing"])

    mount = mounter(library, state_dir=state)
    wait_until(lambda: progress()["headers"] > 20, "the first headers")
    crawls = [os.pidfd_open(pid) for pid in children_of(mount.daemon_pid())]
    assert crawls, "indexing is a process"
    mount.kill_all()
    for crawl in crawls:
        wait_until(lambda crawl=crawl: _has_ended(crawl), "the crawl ends with its daemon")  # type: ignore[misc]
        os.close(crawl)
    mount = mounter(library, state_dir=state)
    done = wait_until(lambda: (now := progress())["done"] and now, "indexing", timeout_s=60)
    assert (done["failure"], done["files"]) == (None, FILES)
    assert 0 < done["headers"] < FILES, "what was recorded stays recorded"
    assert mount.live()["index"]["set_aside"] is None


def _has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])
