"""Names and inode numbers: which number an entry has, and which path a number leads to. No I/O but the index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightfs.errors import StaleError
from weightfs.index.schema import ROOT_INODE, EntryRecord, Kind
from weightfs.index.store import IndexStore

_MAX_DEPTH = 4096  # a path longer than PATH_MAX can't be asked for; a damaged index must not loop


@dataclass(slots=True)
class Node:
    """One inode that is known in memory.

    Attributes:
        inode: its number.
        kind: see `Kind`.
        parent: number of the folder it was last seen in.
        name: its name there.
        key: the source's inode key; empty for virtual entries.
        lookups: how often the kernel was given it.
    """

    inode: int
    kind: Kind
    parent: int
    name: bytes
    key: bytes
    lookups: int = 0


class Tree:
    """The nodes the kernel may know. Runs on one thread; what it drops it finds again in the index.

    Lookup counts only decide what stays in memory: correctness never needs them.
    """

    def __init__(self, index: IndexStore, root_key: bytes) -> None:
        self._index = index
        self._root = Node(ROOT_INODE, Kind.SOURCE, 0, b"", root_key)
        self._nodes: dict[int, Node] = {ROOT_INODE: self._root}
        self._numbers: dict[bytes, int] = {root_key: ROOT_INODE}

    def __len__(self) -> int:
        return len(self._nodes)

    def see(self, kind: Kind, parent: int, name: bytes, key: bytes) -> Node:
        """The node of an entry just seen as `name` in `parent`; made, and its number given out, if it is new."""
        inode = self._numbers.get(key)
        if inode is not None:
            node = self._nodes[inode]
            if inode != ROOT_INODE and (node.parent != parent or node.name != name):
                node.parent, node.name = parent, name
                self._index.put_entry(inode, EntryRecord(kind, parent, name, key))
            return node
        return self._see_first(kind, parent, name, key, self._index.number_of(key))

    def see_all(self, parent: int, entries: Sequence[tuple[bytes, bytes]]) -> list[Node]:
        """`see` for the entries of a source folder, as (name, key): one trip to the index for all that are new."""
        new = [key for _, key in entries if key not in self._numbers]
        numbers = self._index.numbers_of(new) if new else {}
        return [
            self.see(Kind.SOURCE, parent, name, key)
            if key in self._numbers
            else self._see_first(Kind.SOURCE, parent, name, key, numbers.get(key))
            for name, key in entries
        ]

    def _see_first(self, kind: Kind, parent: int, name: bytes, key: bytes, inode: int | None) -> Node:
        """`see` for an entry not in memory, whose recorded number is `inode`."""
        record = EntryRecord(kind, parent, name, key)
        if inode is None:
            inode = self._index.take()
            self._index.put_number(key, inode)
            self._index.put_entry(inode, record)
        elif self._index.entry(inode) != record:
            self._index.put_entry(inode, record)
        return self._remember(Node(inode, kind, parent, name, key))

    def see_virtual(self, kind: Kind, parent: int, name: bytes) -> Node:
        """As `see`, for an entry that exists only on the mount."""
        key = hashlib.blake2b(parent.to_bytes(8, "big") + name, digest_size=16, person=b"weightfs virtual").digest()
        return self.see(kind, parent, name, key)

    def node(self, inode: int) -> Node:
        """The node of a number.

        Raises:
            StaleError: no number of this index.
        """
        node = self._nodes.get(inode)
        if node is None:
            record = self._index.entry(inode)
            if record is None:
                raise StaleError(f"inode {inode:#x} is not known")
            node = self._remember(Node(inode, record.kind, record.parent, record.name, record.key))
        return node

    def node_if_known(self, inode: int) -> Node | None:
        """`node` of a number, None where there is none: it is (or may be) a view's."""
        try:
            return self.node(inode)
        except StaleError:
            return None

    def _remember(self, node: Node) -> Node:
        self._nodes[node.inode] = node
        self._numbers[node.key] = node.inode
        return node

    def path(self, node: Node) -> bytes:
        """Where an entry was last seen, relative to the root.

        Raises:
            StaleError: a folder above it is not known.
        """
        names: list[bytes] = []
        while node.inode != ROOT_INODE:
            names.append(node.name)
            if len(names) > _MAX_DEPTH:
                raise StaleError("its folders form a cycle")
            node = self.node(node.parent)
        return b"/".join(reversed(names))

    def path_if_known(self, inode: int) -> bytes | None:
        """`path` of a number, None where there is none."""
        try:
            return self.path(self.node(inode))
        except StaleError:
            return None

    def number_if_known(self, key: bytes) -> int | None:
        """The number of an inode key whose node is in memory."""
        return self._numbers.get(key)

    def count_lookup(self, node: Node) -> None:
        """The kernel was given this node once more."""
        node.lookups += 1

    def forget(self, inode: int, lookups: int) -> Node | None:
        """The kernel takes back that many of its look-ups; gives the node if these were the last."""
        node = self._nodes.get(inode)
        if node is None or node is self._root:
            return None
        node.lookups -= lookups
        if node.lookups > 0:
            return None
        del self._nodes[inode]
        self._numbers.pop(node.key, None)
        return node

    def drop(self, inodes: Iterable[int]) -> None:
        """Forget nodes that the index has dropped."""
        for inode in inodes:
            if (node := self._nodes.pop(inode, None)) is not None:
                self._numbers.pop(node.key, None)

    def shed(self) -> None:
        """Forget nodes that the kernel does not hold: seen in passing, never taken back by a FORGET."""
        self.drop([node.inode for node in self._nodes.values() if node.lookups <= 0 and node is not self._root])
