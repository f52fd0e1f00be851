"""A folder as a small FUSE filesystem that fails where a test says: parts of files answer EIO, late, or not at all.

`failing(folder, at)` mounts it from a process of its own, so that a test may ask it and order it about at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyfuse3
import trio

_ATTRIBUTES = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns")


@dataclass
class Faults:
    """What is ordered.

    Attributes:
        parts: path below the folder -> (first byte, byte behind, `EIO` or `hang`).
        delay_s: before each read is answered.
        letting_go: whoever hangs waits for it.
    """

    parts: Mapping[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    delay_s: float = 0.0
    letting_go: trio.Event = field(default_factory=trio.Event)


class FailingFilesystem(pyfuse3.Operations):
    """What lay in a folder when it was made, and that the kernel caches as it does any filesystem's."""

    def __init__(self, folder: str, faults: Faults) -> None:
        super().__init__()
        self._folder = folder
        self.faults = faults
        names = [""] + [
            os.path.relpath(os.path.join(at, name), folder)
            for at, folders, files in os.walk(folder)
            for name in (*folders, *files)
        ]
        self._paths = dict(enumerate(names, pyfuse3.ROOT_INODE))
        self._inodes = {path: inode for inode, path in self._paths.items()}

    def _entry(self, inode: int) -> pyfuse3.EntryAttributes:
        found = os.stat(os.path.join(self._folder, self._paths[inode]))
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = 300
        for name in _ATTRIBUTES:
            setattr(entry, name, getattr(found, name))
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        inode = self._inodes.get(os.path.join(self._paths[parent], os.fsdecode(name)))
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._entry(inode)

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._entry(inode)

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        return pyfuse3.StatvfsData()

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        for inode, path in sorted(self._paths.items()):
            name = os.fsencode(os.path.basename(path))
            if inode <= max(start_id, pyfuse3.ROOT_INODE) or os.path.dirname(path) != self._paths[fh]:
                continue
            if not pyfuse3.readdir_reply(token, name, self._entry(inode), inode):
                return

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        path = self._paths[fh]
        for start, end, fault in self.faults.parts.get(path, ()):
            if off < end and start < off + size:
                if fault == "EIO":
                    raise pyfuse3.FUSEError(errno.EIO)
                await self.faults.letting_go.wait()
        await trio.sleep(self.faults.delay_s)
        with open(os.path.join(self._folder, path), "rb") as file:
            return os.pread(file.fileno(), size, off)


async def _obey(filesystem: FailingFilesystem) -> None:
    """Take orders, a JSON document a line, until there are no more."""
    async for line in trio.wrap_file(sys.stdin):
        filesystem.faults.letting_go.set()
        filesystem.faults = Faults(**json.loads(line))
        print("done", flush=True)
    filesystem.faults.letting_go.set()
    filesystem.faults = Faults()
    pyfuse3.terminate()


async def _serve(folder: str, mountpoint: str) -> None:
    filesystem = FailingFilesystem(folder, Faults())
    pyfuse3.init(filesystem, mountpoint, {*pyfuse3.default_options, "fsname=failing", "allow_other"})
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, filesystem)
            print("mounted", flush=True)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close()


@dataclass
class FailingSource:
    """Attributes: folder, where it is mounted; process, that serves it."""

    folder: str
    process: subprocess.Popen[str]

    def order(self, parts: Mapping[str, list[tuple[int, int, str]]] | None = None, *, delay_s: float = 0.0) -> None:
        """What fails from now on; what hung before is let go."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"parts": dict(parts or {}), "delay_s": delay_s}) + "\n")
        self.process.stdin.flush()
        assert self._said() == "done"

    def _said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextlib.contextmanager
def failing(folder: str, at: str) -> Iterator[FailingSource]:
    """Show a folder at another place until the end of the block; it fails where that is ordered."""
    os.makedirs(at, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.failing_source", folder, at],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    source = FailingSource(at, process)
    with process:
        try:
            assert source._said() == "mounted", "the source could not be mounted"
            yield source
        finally:
            assert process.stdin is not None
            process.stdin.close()
            subprocess.run(["umount", "-l", "--", at], capture_output=True, check=False)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    trio.run(_serve, sys.argv[1], sys.argv[2])
