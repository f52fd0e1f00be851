"""What the kernel was told it may believe for long, and how it is told that this has changed.

A name may be believed while its folder is watched, and only if the watch was set *before* the name was examined: what
changes after that is told of. Each examination notes the number of the last batch of changes then (`Sight.token`); an
answer given after a later batch touched the folder is not for long. What is on its way to the kernel when a change is
worked on is dealt with there: an answer to a LOOKUP or a listing is taken in under the folder's lock, which taking a
name away waits for, and answers older than an attribute's invalidation are ignored.

Runs on the trio thread, except `examine` and `list_folder`, which may wait for the source.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from dataclasses import dataclass, field
from typing import Final, Protocol

from weightfs.index.schema import ROOT_INODE
from weightfs.index.store import IndexStore
from weightfs.notifier import Notifier
from weightfs.source.base import Sight, SourceStat, WouldBlockError
from weightfs.source.local import LocalSource, tells_of_changes
from weightfs.tree import Node, Tree
from weightfs.walk import Listed, Rows
from weightfs.watch import Batch, Kind, Watcher

log = logging.getLogger(__name__)

NAMES_S: Final = 3600.0
"""How long names, and folders' attributes, are believed."""
FILES_S: Final = 60.0
"""How long files' attributes are: an edit through a hard link elsewhere, or through a mapping, is told by no event."""


class _Facts(Protocol):
    """What is looked at of an inode's attributes; times in nanoseconds."""

    @property
    def mode(self) -> int: ...
    @property
    def nlink(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def ctime_ns(self) -> int: ...


@dataclass(slots=True)
class _Folder:
    """A watched folder: its inode number once known, the batch that touched it last, what its names were told to be."""

    inode: int | None = None
    changed_at: int = 0
    names: dict[bytes, int] = field(default_factory=dict)


class Beliefs:
    """The long answers of one mount.

    Args:
        short_s: for how long names and attributes are believed that nobody watches.
    """

    def __init__(
        self,
        source: LocalSource,
        tree: Tree,
        index: IndexStore,
        watcher: Watcher,
        notifier: Notifier,
        *,
        short_s: float,
    ) -> None:
        self._source = source
        self._tree = tree
        self._index = index
        self._watcher = watcher
        self._notifier = notifier
        self._short_s = short_s
        self._token = 0
        self._epoch = index.epoch
        self._all_changed_at = 0
        self._folders: dict[bytes, _Folder] = {}
        self._by_inode: dict[int, _Folder] = {}
        self._told: dict[int, tuple[int, int, int, float]] = {}
        self._watchable: dict[int, bool] = {}

    # Examining

    def examine(self, folder: bytes, name: bytes, *, cached_only: bool = False) -> Sight:
        """What `name` is in a folder; the folder is watched from before that on, where it can be.

        Args:
            name: empty for the folder itself.
            cached_only: raise WouldBlockError rather than wait for a device.
        """
        token = self._token
        fd = self._source.folder(folder, cached_only=cached_only)
        try:
            key = self._watch(fd)
            if not name:
                return Sight(token, key, self._source.fstat(fd))
            child = self._source.child(fd, name, cached_only=cached_only)
            try:
                return Sight(token, key, self._stat_watched(child))
            finally:
                os.close(child)
        finally:
            os.close(fd)

    def list_folder(self, path: bytes) -> Listed:
        """A folder and its entries; it, and the folders in it, are watched from before that on."""
        token = self._token
        fd = self._source.folder(path, listing=True)
        rows: Rows = []
        try:
            key = self._watch(fd)
            own = self._source.fstat(fd)
            for name in os.listdir(fd):
                raw = os.fsencode(name)
                try:
                    entry = self._source.stat_at(fd, raw)
                    if key is not None and entry.is_directory and entry.inode_key not in self._watcher:
                        child = self._source.child(fd, raw)
                        try:
                            self._watch(child, entry)
                            entry = self._source.fstat(child)
                        finally:
                            os.close(child)
                except OSError:
                    continue  # it has vanished
                rows.append((raw, entry))
        finally:
            os.close(fd)
        return Listed(own.identity, rows, Sight(token, key, own))

    def _stat_watched(self, fd: int) -> SourceStat:
        entry = self._source.fstat(fd)
        if entry.is_directory and entry.inode_key not in self._watcher and self._watch(fd, entry) is not None:
            return self._source.fstat(fd)  # again: what changed before there was a watch was told by nobody
        return entry

    def _watch(self, fd: int, known: SourceStat | None = None) -> bytes | None:
        """Watch the folder behind a descriptor; gives its key, None where it is not watched."""
        raw = os.fstat(fd)
        place = raw.st_dev, raw.st_ino
        if (key := self._watcher.key_of(place)) is not None:
            return key
        can = self._watchable.get(raw.st_dev)
        if can is None:
            can = self._watchable[raw.st_dev] = tells_of_changes(fd)
        if not can:
            self._watcher.refuse(place, "its filesystem may be changed by others than this machine")
            return None
        entry = known if known is not None and known.inode == raw.st_ino else self._source.fstat(fd)
        return entry.inode_key if self._watcher.add(fd, place, entry.inode_key) else None

    # Answering

    def answer(self, sight: Sight, folder: Node) -> Answer:
        """To a request for names of a folder, as they were when it was examined. To be given at once: see `Answer`."""
        if self._epoch != self._index.epoch:
            # The index was lost under us, and with it what a successor would need to know.
            self._epoch = self._index.epoch
            self._all_changed()
        return Answer(self, sight, folder, self._folder(folder) if self._is_fresh(sight, folder) else None)

    def own_timeout(self, sight: Sight, node: Node) -> float:
        """For how long a folder's own attributes may be believed that were examined by themselves."""
        if self._is_fresh(sight, node):
            self._folder(node)
            return NAMES_S
        return self._short_s

    def _is_fresh(self, sight: Sight, folder: Node) -> bool:
        if sight.folder != folder.key or folder.key not in self._watcher:
            return False
        found = self._folders.get(folder.key)
        return max(found.changed_at if found is not None else 0, self._all_changed_at) <= sight.token

    def _folder(self, node: Node) -> _Folder:
        found = self._folders.get(node.key)
        if found is None:
            found = self._folders[node.key] = _Folder()
        if found.inode is None:
            found.inode = node.inode
            self._by_inode[node.inode] = found
        return found

    def _is_mounted_over(self, folder: Node, name: bytes) -> bool:
        mounts = self._watcher.mounts_below
        return bool(mounts) and os.path.join(self._tree.path(folder), name) in mounts

    def is_believed(self, inode: int, entry: SourceStat) -> bool:
        """Whether what the kernel believes of a file, about to be opened, is true or as old as without a watch.

        If not it is forgotten here and there: the open is to be answered ESTALE, upon which the kernel asks anew.
        """
        told = self._told.get(inode)
        if told is None or told[:3] == (entry.size, entry.mtime_ns, entry.ctime_ns):
            return True
        if time.monotonic() - told[3] <= self._short_s:
            return True
        del self._told[inode]
        self._notifier.attributes_changed(inode)
        return False

    def forgotten(self, node: Node) -> None:
        """The kernel does not know an inode any more."""
        self._told.pop(node.inode, None)
        parent = self._by_inode.get(node.parent)
        if parent is not None and parent.names.get(node.name) == node.inode:
            del parent.names[node.name]
        if self._by_inode.pop(node.inode, None) is not None or node.key in self._watcher:
            self._folders.pop(node.key, None)
            self._watcher.remove(node.key)

    # Changes

    def apply(self, batch: Batch) -> dict[bytes, set[bytes]]:
        """Tell the kernel of a batch; gives the names touched by their folder's path, for whoever remembers them."""
        self._token += 1
        if batch.everything:
            self._all_changed()
            return {}
        touched: dict[bytes, set[bytes]] = {}
        by_folder: dict[bytes, dict[bytes, Kind]] = {}
        for (key, name), kind in batch.names.items():
            by_folder.setdefault(key, {})[name] = kind
        for key, names in by_folder.items():
            if key not in self._folders and key not in self._watcher:
                continue  # forgotten since
            folder = self._folders.setdefault(key, _Folder())
            folder.changed_at = self._token
            if folder.inode is not None:
                path = self._tree.path_if_known(folder.inode)
                if path is not None:
                    touched[path] = set(names)
                self._tell(folder, folder.inode, names)
        return touched

    def _tell(self, folder: _Folder, inode: int, names: dict[bytes, Kind]) -> None:
        own = names.pop(b"", Kind(0))
        if own & Kind.ENDED:
            self._notifier.folder_changed(inode, doubtful=folder.names, inodes=folder.names.values())
            folder.names.clear()
            return
        gone: dict[bytes, None] = {}
        files: list[tuple[bytes, int]] = []
        changed: list[int] = []
        appeared = b""
        for name, kind in names.items():
            child = folder.names.get(name)
            if child is None:
                child = self._other_name(inode, name)
                if child is None:
                    appeared = name if kind & Kind.NAME else appeared
                    continue
            self._told.pop(child, None)
            if kind & Kind.NAME:
                gone[name] = None
                changed.append(child)
                folder.names.pop(name, None)
            else:
                files.append((name, child))
            if kind & Kind.CONTENT:
                self._notifier.content_changed(child)
        if gone or appeared:
            # A new name that the kernel can't know is named all the same: a listing that lacks it may be on its way.
            self._notifier.folder_changed(inode, gone=gone or (appeared,), inodes=changed)
        if files:
            self._notifier.files_changed(inode, files)
        if own & Kind.ATTRIBUTES:
            self._notifier.attributes_changed(inode)

    def _other_name(self, folder: int, name: bytes) -> int | None:
        """The inode of a name that was not told for long, if it is a hard link to one that was."""
        path = self._tree.path_if_known(folder)
        if path is None:
            return None
        try:
            entry = self._source.lstat(os.path.join(path, name), cached_only=True)
        except (OSError, WouldBlockError):
            return None
        number = self._tree.number_if_known(entry.inode_key) if entry.nlink > 1 else None
        return number if number in self._told else None

    def _all_changed(self) -> None:
        self._all_changed_at = self._token
        self._told.clear()
        for folder in self._folders.values():
            if folder.inode is not None:
                self._notifier.folder_changed(folder.inode, doubtful=folder.names, inodes=folder.names.values())

    def view_changed(self, inode: int) -> None:
        """A view's file changed: nothing that is cached of it is true."""
        self._notifier.content_changed(inode)

    def status(self) -> dict[str, object]:
        """For `status`. Callable in any thread."""
        return {
            "state": "inotify",
            "folders": len(self._watcher),
            "unwatched": self._watcher.refused(),
            "batches": self._watcher.batches,
            "overflows": self._watcher.overflows,
            "notified": dict(self._notifier.sent),
        }


class Answer:
    """For how long the names of a folder, and what they mean, may be believed; notes what the kernel is told.

    Must be given before anything else runs on the trio thread: the next batch of changes may make it untrue.
    """

    __slots__ = ("_beliefs", "_folder", "_node", "_now", "_sight")

    def __init__(self, beliefs: Beliefs, sight: Sight, node: Node, folder: _Folder | None) -> None:
        self._beliefs = beliefs
        self._sight = sight
        self._node = node
        self._folder = folder
        self._now = time.monotonic()

    def timeouts(self, name: bytes, node: Node, now: _Facts) -> tuple[float, float]:
        """Of a name that means `node`, whose attributes are `now`: seconds for the name, and for the attributes."""
        beliefs = self._beliefs
        short = beliefs._short_s, beliefs._short_s
        if self._folder is None:
            return short
        self._folder.names[name] = node.inode
        if not beliefs._index.is_committed(node.inode):
            return short  # a successor asks anew for what the index says, so nothing else is told for long
        if not stat.S_ISDIR(now.mode):
            if now.nlink != 1 or beliefs._is_mounted_over(self._node, name):
                return short
            beliefs._told[node.inode] = now.size, now.mtime_ns, now.ctime_ns, self._now
            return NAMES_S, FILES_S
        is_watched = node.key in beliefs._watcher and beliefs._folder(node).changed_at <= self._sight.token
        return NAMES_S, NAMES_S if is_watched else beliefs._short_s


def resynchronise(index: IndexStore, notifier: Notifier) -> None:
    """Have the kernel ask anew for all it may believe: once, for the successor of a daemon that knew more than it does.

    What a predecessor told for long is in its index: see `Answer.timeouts`. Blocking, for a worker thread: 0.3 s for
    11,000 entries. Until it returns, what changed while nobody watched may be believed.
    """
    if index.set_aside is not None:
        notifier.forget_all_names()  # its names are not in this index; attributes told for long run out by themselves
    notifier.attributes_changed(ROOT_INODE)
    notifier.sweep((record.parent, record.name, inode) for inode, record in index.entries())
