"""Libraries of sparse models, and indexing without a mount."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from weightfs import crawl
from weightfs.handles import HandleTable
from weightfs.index.store import IndexStore
from weightfs.indexing import Indexer
from weightfs.source.local import LocalSource
from weightfs.tree import Tree

_TOOL = Path(__file__).parents[2] / "tools" / "make_library.py"


def make_library(root: str, *, folders: int, files: int, tensors: int) -> list[str]:
    """Make one as a user would; gives the folders' paths."""
    numbers = ["--folders", str(folders), "--files", str(files), "--tensors", str(tensors)]
    subprocess.run([sys.executable, _TOOL, root, *numbers], stdout=subprocess.DEVNULL, timeout=60, check=True)
    return sorted(entry.path for entry in os.scandir(root) if entry.is_dir())


class Host:
    """What indexing needs of a mount, without one; the crawl runs in a thread of this process.

    Attributes:
        tree: told what was dropped, as a mount's is.
        handles: of inodes that are to count as open.
    """

    def __init__(self, source: LocalSource, index: IndexStore) -> None:
        self.source = source
        self.index = index
        self.handles = HandleTable()
        self.tree = Tree(index, source.lstat(b"").inode_key)
        self.indexer = Indexer(source, index, self.handles, self.tree)

    def crawl(self) -> dict[str, Any]:
        """Commit what is pending, crawl once; gives the progress it ended with."""
        self.index.flush()
        self.indexer._progress = type(self.indexer._progress)()
        pipes = [os.pipe(), os.pipe()]
        (their_in, our_out), (our_in, their_out) = pipes
        failures: list[BaseException] = []

        def run() -> None:
            with open(their_in, "rb") as reader, open(their_out, "wb") as writer:
                try:
                    wire = crawl.Wire(reader, writer, crawl.ToCrawl)
                    start = wire.receive()
                    assert isinstance(start, crawl.Start)
                    crawl.Crawl(self.source, wire).run(prune=start.prune)
                    wire.send(crawl.Done(None))
                except BaseException as e:  # noqa: BLE001 - handed to the test
                    failures.append(e)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            with open(our_in, "rb") as reader, open(our_out, "wb") as writer:
                wire = crawl.Wire(reader, writer, crawl.FromCrawl)
                assert self.indexer._converse(wire, lambda function, *arguments: function(*arguments)) is None
        finally:
            thread.join(20)
            if failures:
                raise failures[0]
        return self.indexer.status()
