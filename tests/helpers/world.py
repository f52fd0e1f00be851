"""A source that changes, a mount of it, and a plain model in memory of what the mount must show.

Every method makes one operation, chosen by the `Random` it is given, or none where there is nothing to choose. The
model is the promises of SEMANTICS.md: exact where the mount asks each time (`patience_s` 0), else true soon.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from tests.helpers.models import Tensor, safetensors_bytes

_NAMES: Final = [f"n{number}" for number in range(12)]
_MODES: Final = (0o644, 0o600, 0o444, 0o755)
_MOST_BYTES: Final = 200_000
_MOST_KEPT: Final = 8
_MOST_DEPTH: Final = 4
YOUNG_S: Final = 2.5
"""A view opened less than 2 s after its file changed is not known to the daemon's successor."""


@dataclass(eq=False)
class Node:
    """An inode: a file (`content`), a folder (`children`) or a symlink (`target`); `views` are (offset, bytes)."""

    kind: int
    content: bytearray = field(default_factory=bytearray)
    children: dict[str, Node] = field(default_factory=dict)
    target: str = ""
    mode: int = 0o644
    nlink: int = 1
    xattr: bytes | None = None
    views: dict[str, tuple[int, int]] = field(default_factory=dict)
    version: int = 0
    changed_at: float = 0.0
    number: int | None = None
    mappings: int = 0

    def change(self) -> None:
        """Something in it or of it is not as it was: ctime tells."""
        self.version += 1
        self.changed_at = time.monotonic()


@dataclass(eq=False)
class Kept:
    """A handle, a mapping or an open view."""

    node: Node
    fd: int
    mapped: mmap.mmap | None = None
    snapshot: bytes | None = None
    version: int = 0
    opened_at: float = 0.0


Place = tuple[str, Node, str, Node]
"""Path from the root, folder, name, node."""


class World:
    """See the module.

    Attributes:
        latencies: seconds of each operation, by name; with what the model and the source take, and patience.
        stale: how often ESTALE was the answer where a promise allows it.
        last_death: when a daemon died last, on the monotonic clock.
    """

    def __init__(self, source: str, mountpoint: str, *, patience_s: float, cuts_are_stale: bool) -> None:
        """Begin with an empty folder.

        Args:
            source: that folder; another one beside it, `<source>.aside`, is for files that will be renamed into it.
            mountpoint: where it shows.
            patience_s: how long the mount may show what was.
            cuts_are_stale: whether reading behind a cut answers ESTALE (the portable engine).
        """
        self._source = source
        self._mountpoint = mountpoint
        self._patience_s = patience_s
        self._cuts_are_stale = cuts_are_stale
        self._aside = source + ".aside"
        os.makedirs(self._aside, exist_ok=True)
        self._root = Node(stat.S_IFDIR, mode=stat.S_IMODE(os.stat(source).st_mode))
        self._kept: list[Kept] = []
        self._numbers: dict[int, Node] = {}  # every one that was ever seen
        self.latencies: dict[str, array[float]] = {}
        self.stale = 0
        self.last_death = 0.0

    def do(self, operation: str, chosen: random.Random) -> None:
        """Make an operation, one of `CHANGES` or `USES`."""
        started = time.perf_counter()
        getattr(self, operation)(chosen)
        self.latencies.setdefault(operation, array("d")).append(time.perf_counter() - started)

    # Choosing

    def _all(self, folder: Node | None = None, path: str = "") -> Iterator[Place]:
        folder = folder or self._root
        for name, node in folder.children.items():
            place = os.path.join(path, name)
            yield place, folder, name, node
            if node.kind == stat.S_IFDIR:
                yield from self._all(node, place)

    def _one(self, chosen: random.Random, *kinds: int, weights: bool | None = None) -> Place | None:
        fitting = [
            place
            for place in self._all()
            if (not kinds or place[3].kind in kinds) and (weights is None or bool(place[3].views) == weights)
        ]
        return chosen.choice(fitting) if fitting else None

    def _folder(self, chosen: random.Random) -> tuple[str, Node]:
        folders = [("", self._root)]
        folders += [(path, node) for path, _, _, node in self._all() if node.kind == stat.S_IFDIR]
        return chosen.choice(folders)

    def _free(self, chosen: random.Random, suffix: str = "") -> tuple[str, Node, str] | None:
        path, folder = self._folder(chosen)
        name = chosen.choice(_NAMES) + suffix
        return None if name in folder.children else (os.path.join(path, name), folder, name)

    def _bare(self, path: str) -> str:
        return os.path.join(self._source, path) if path else self._source

    def _shown(self, path: str) -> str:
        return os.path.join(self._mountpoint, path) if path else self._mountpoint

    # The source

    def create(self, chosen: random.Random) -> None:
        """A file."""
        if (free := self._free(chosen)) is not None:
            path, folder, name = free
            folder.children[name] = self._write(self._bare(path), chosen)

    def create_weights(self, chosen: random.Random) -> None:
        """A safetensors file."""
        if (free := self._free(chosen, ".safetensors")) is not None:
            path, folder, name = free
            folder.children[name] = self._write_weights(self._bare(path), chosen)

    def replace_file(self, chosen: random.Random) -> None:
        """Another file takes a file's name."""
        if (place := self._one(chosen, stat.S_IFREG)) is not None:
            path, folder, name, node = place
            fresh = os.path.join(self._aside, "fresh")
            write = self._write_weights if node.views else self._write
            folder.children[name] = write(fresh, chosen)
            os.rename(fresh, self._bare(path))
            self._unlinked(node)

    def edit(self, chosen: random.Random) -> None:
        """Some bytes in place; of weights, no byte of the header."""
        place = self._one(chosen, stat.S_IFREG)
        if place is not None and place[3].content:
            path, _, _, node = place
            first = min((offset for offset, _ in node.views.values()), default=0)
            if first >= len(node.content):
                return
            at = chosen.randrange(first, len(node.content))
            data = chosen.randbytes(min(chosen.randrange(1, 5000), len(node.content) - at))
            with open(self._bare(path), "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), data, at)
            node.content[at : at + len(data)] = data
            node.change()

    def append(self, chosen: random.Random) -> None:
        """More bytes behind the end."""
        if (place := self._one(chosen, stat.S_IFREG, weights=False)) is not None:
            path, _, _, node = place
            data = chosen.randbytes(chosen.randrange(1, 5000))
            with open(self._bare(path), "ab", buffering=0) as file:
                file.write(data)
            node.content += data
            node.change()

    def truncate(self, chosen: random.Random) -> None:
        """Fewer bytes; not of what is mapped, which would be SIGBUS on the bare file, too."""
        place = self._one(chosen, stat.S_IFREG, weights=False)
        if place is not None and not place[3].mappings and place[3].content:
            path, _, _, node = place
            size = chosen.randrange(len(node.content))
            os.truncate(self._bare(path), size)
            del node.content[size:]
            node.change()

    def chmod(self, chosen: random.Random) -> None:
        """Another mode."""
        if (place := self._one(chosen, stat.S_IFREG, stat.S_IFDIR)) is not None:
            path, _, _, node = place
            node.mode = chosen.choice(_MODES) | (0o100 if node.kind == stat.S_IFDIR else 0)
            os.chmod(self._bare(path), node.mode)
            node.change()

    def set_xattr(self, chosen: random.Random) -> None:
        """An extended attribute."""
        if (place := self._one(chosen, stat.S_IFREG)) is not None:
            path, _, _, node = place
            node.xattr = chosen.randbytes(8)
            os.setxattr(self._bare(path), "user.world", node.xattr)
            node.change()

    def link(self, chosen: random.Random) -> None:
        """A second name of a file."""
        place, free = self._one(chosen, stat.S_IFREG, weights=False), self._free(chosen)
        if place is not None and free is not None:
            os.link(self._bare(place[0]), self._bare(free[0]))
            free[1].children[free[2]] = place[3]
            place[3].nlink += 1
            place[3].change()

    def symlink(self, chosen: random.Random) -> None:
        """A symlink to a name beside it, which need not exist."""
        if (free := self._free(chosen)) is not None:
            path, folder, name = free
            node = Node(stat.S_IFLNK, target=chosen.choice([other for other in _NAMES if other != name]))
            os.symlink(node.target, self._bare(path))
            folder.children[name] = node
            node.change()

    def mkdir(self, chosen: random.Random) -> None:
        """A folder."""
        free = self._free(chosen)
        if free is not None and free[0].count("/") < _MOST_DEPTH:
            path, folder, name = free
            os.mkdir(self._bare(path), 0o755)
            os.chmod(self._bare(path), 0o755)
            folder.children[name] = Node(stat.S_IFDIR, mode=0o755)
            folder.children[name].change()

    def rename(self, chosen: random.Random) -> None:
        """A file, folder or symlink gets another name, maybe in another folder."""
        place = self._one(chosen)
        if place is None:
            return
        path, folder, name, node = place
        free = self._free(chosen, ".safetensors" if name.endswith(".safetensors") else "")
        if free is None or (free[0] + "/").startswith(path + "/"):
            return
        os.rename(self._bare(path), self._bare(free[0]))
        free[1].children[free[2]] = folder.children.pop(name)
        node.change()
        for _, _, _, below in self._all(node) if node.kind == stat.S_IFDIR else ():
            below.changed_at = node.changed_at

    def unlink(self, chosen: random.Random) -> None:
        """A name goes."""
        if (place := self._one(chosen, stat.S_IFREG, stat.S_IFLNK)) is not None:
            path, folder, name, node = place
            os.unlink(self._bare(path))
            del folder.children[name]
            self._unlinked(node)

    def rmdir(self, chosen: random.Random) -> None:
        """An empty folder goes."""
        place = self._one(chosen, stat.S_IFDIR)
        if place is not None and not place[3].children:
            os.rmdir(self._bare(place[0]))
            del place[1].children[place[2]]

    def _write(self, path: str, chosen: random.Random) -> Node:
        data = chosen.randbytes(chosen.choice([0, 1, 4096, chosen.randrange(_MOST_BYTES)]))
        return self._new(path, data, {})

    def _write_weights(self, path: str, chosen: random.Random) -> Node:
        tensors = {
            f"layer.{number}": Tensor("U8", (size,), chosen.randbytes(size))
            for number, size in enumerate(chosen.randrange(1, 20_000) for _ in range(chosen.randrange(1, 4)))
        }
        data = safetensors_bytes(tensors)
        at, views = len(data) - sum(len(tensor.data) for tensor in tensors.values()), {}
        for name, tensor in tensors.items():
            views[name] = at, len(tensor.data)
            at += len(tensor.data)
        return self._new(path, data, views)

    def _new(self, path: str, data: bytes, views: dict[str, tuple[int, int]]) -> Node:
        with open(path, "xb") as file:
            file.write(data)
        os.chmod(path, 0o644)
        node = Node(stat.S_IFREG, bytearray(data), views=views)
        node.change()
        return node

    def _unlinked(self, node: Node) -> None:
        node.nlink -= 1
        node.change()

    # The mount

    def _soon(self, check: Callable[[], None]) -> None:
        """The check must hold now, or within the patience."""
        ends = time.monotonic() + self._patience_s
        while True:
            try:
                check()
                return
            except (AssertionError, OSError):
                if time.monotonic() >= ends:
                    raise
            time.sleep(0.02)

    def look(self, chosen: random.Random) -> None:
        """stat(2) of one entry."""
        if (place := self._one(chosen)) is not None:
            self._soon(lambda: self._compare_stat(place))

    def _compare_stat(self, place: Place) -> None:
        path, _, _, node = place
        seen = os.lstat(self._shown(path))
        assert stat.S_IFMT(seen.st_mode) == node.kind, path
        if node.kind != stat.S_IFLNK:
            assert stat.S_IMODE(seen.st_mode) == node.mode, path
        if node.kind == stat.S_IFREG:
            assert seen.st_size == len(node.content), path
            self._compare_nlink(path, node, seen.st_nlink)
        self._compare_number(path, node, seen.st_ino)

    def _is_unsure(self, node: Node) -> bool:
        """Whether the mount may still show something else under its name."""
        return time.monotonic() - node.changed_at < self._patience_s

    def _compare_nlink(self, what: str, node: Node, nlink: int) -> None:
        """Where the mount believes what it saw, another name's link shows within 60 s only."""
        assert nlink == node.nlink or self._patience_s, f"{what} has {nlink} links instead of {node.nlink}"

    def _compare_number(self, path: str, node: Node, number: int) -> None:
        if node.number is None and self._is_unsure(node):
            return  # its name may still mean what it meant before
        owner = self._numbers.setdefault(number, node)
        assert owner is node, f"{path} has the number of another file"
        node.number = node.number or number
        assert number == node.number, f"{path} has another number"

    def look_for_nothing(self, chosen: random.Random) -> None:
        """A name that is not there."""
        if (free := self._free(chosen)) is not None:

            def absent() -> None:
                assert not os.path.lexists(self._shown(free[0])), free[0]

            self._soon(absent)

    def list_folder(self, chosen: random.Random) -> None:
        """The names of one folder."""
        path, folder = self._folder(chosen)

        def compare() -> None:
            assert sorted(os.listdir(self._shown(path))) == sorted(folder.children), path

        self._soon(compare)

    def read_link(self, chosen: random.Random) -> None:
        """Where a symlink leads."""
        if (place := self._one(chosen, stat.S_IFLNK)) is not None:

            def compare() -> None:
                assert os.readlink(self._shown(place[0])) == place[3].target

            self._soon(compare)

    def read_xattr(self, chosen: random.Random) -> None:
        """An extended attribute."""
        place = self._one(chosen, stat.S_IFREG)
        if place is not None and place[3].xattr is not None:

            def compare() -> None:
                assert os.getxattr(self._shown(place[0]), "user.world") == place[3].xattr

            self._soon(compare)

    def read_file(self, chosen: random.Random) -> None:
        """A whole file, by name."""
        if (place := self._one(chosen, stat.S_IFREG)) is not None:

            def compare() -> None:
                with open(self._shown(place[0]), "rb", buffering=0) as file:
                    seen = file.readall()
                assert seen == place[3].content, _differ(place[0], seen, place[3].content)

            self._soon(compare)

    def read_view(self, chosen: random.Random) -> None:
        """A tensor, by name."""
        if (found := self._view(chosen)) is not None:
            path, node, (offset, nbytes) = found

            def compare() -> None:
                with open(self._shown(path), "rb", buffering=0) as file:
                    seen = file.readall()
                assert seen == node.content[offset : offset + nbytes], path

            self._soon(compare)

    def _view(self, chosen: random.Random) -> tuple[str, Node, tuple[int, int]] | None:
        place = self._one(chosen, stat.S_IFREG, weights=True)
        if place is None:
            return None
        path, _, name, node = place
        tensor = chosen.choice(list(node.views))
        folder = os.path.join(os.path.dirname(path), ".tensors", name.removesuffix(".safetensors"))
        return os.path.join(folder, tensor), node, node.views[tensor]

    def keep_open(self, chosen: random.Random) -> None:
        """Open a file and keep the handle."""
        place = self._one(chosen, stat.S_IFREG)
        if place is not None and not (place[3].number is None and self._is_unsure(place[3])):
            fd = self._opened(place[0], lambda fd: self._compare_number(place[0], place[3], os.fstat(fd).st_ino))
            self._keep(Kept(place[3], fd))

    def keep_mapped(self, chosen: random.Random) -> None:
        """Map a file and keep the mapping."""
        place = self._one(chosen, stat.S_IFREG)
        if place is not None and place[3].content and not (place[3].number is None and self._is_unsure(place[3])):
            node = place[3]

            def whole(fd: int) -> None:
                seen = os.fstat(fd)
                assert seen.st_size == len(node.content)
                self._compare_number(place[0], node, seen.st_ino)

            fd = self._opened(place[0], whole)
            mapped = mmap.mmap(fd, len(node.content), prot=mmap.PROT_READ)
            node.mappings += 1
            self._keep(Kept(node, fd, mapped=mapped))

    def keep_view(self, chosen: random.Random) -> None:
        """Open a tensor and keep the handle."""
        if (found := self._view(chosen)) is not None:
            path, node, (offset, nbytes) = found
            snapshot = bytes(node.content[offset : offset + nbytes])

            def first(fd: int) -> None:
                assert os.pread(fd, 16, 0) == snapshot[:16]

            fd = self._opened(path, first)
            self._keep(Kept(node, fd, snapshot=snapshot, version=node.version, opened_at=time.monotonic()))

    def _opened(self, path: str, check: Callable[[int], None]) -> int:
        found: list[int] = []

        def attempt() -> None:
            fd = os.open(self._shown(path), os.O_RDONLY)
            try:
                check(fd)
            except BaseException:
                os.close(fd)
                raise
            found.append(fd)

        self._soon(attempt)
        return found[0]

    def _keep(self, kept: Kept) -> None:
        self._kept.append(kept)
        if len(self._kept) > _MOST_KEPT:
            self._let_go(self._kept.pop(0))

    def _let_go(self, kept: Kept) -> None:
        if kept.mapped is not None:
            kept.mapped.close()
            kept.node.mappings -= 1
        os.close(kept.fd)

    def use_kept(self, chosen: random.Random) -> None:
        """Read from a handle or mapping that was opened before."""
        if self._kept:
            kept = chosen.choice(self._kept)
            if chosen.random() < 0.5:
                os.posix_fadvise(kept.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if kept.snapshot is not None:
                self._use_view(kept, kept.snapshot)
            elif kept.mapped is not None:
                mapped = kept.mapped

                def same() -> None:
                    os.fstat(kept.fd)  # lets the portable engine's kernel notice that its pages are old
                    wanted = kept.node.content[: len(mapped)]
                    assert mapped[:] == wanted, _differ("a mapping", mapped[:], wanted)

                self._soon(same)
            else:
                self._soon(lambda: self._use_handle(kept))

    def _use_handle(self, kept: Kept) -> None:
        try:
            seen = os.pread(kept.fd, _MOST_BYTES * 2, 0)
        except OSError as e:
            if e.errno != errno.ESTALE or not self._cuts_are_stale:
                raise
            self.stale += 1  # it was cut while it was open
            return
        assert seen == kept.node.content, _differ("a kept handle", seen, kept.node.content)
        self._compare_nlink("a kept handle", kept.node, os.fstat(kept.fd).st_nlink)

    def _use_view(self, kept: Kept, snapshot: bytes) -> None:
        try:
            seen = os.pread(kept.fd, len(snapshot) + 1, 0)
            whole = kept.version == kept.node.version  # else it may end where the kernel's cached pages end
            assert seen == (snapshot if whole else snapshot[: len(seen)]), _differ("an open view", seen, snapshot)
        except OSError as e:
            if e.errno != errno.ESTALE or kept.version == kept.node.version:
                raise
            self.stale += 1

    def let_go(self, chosen: random.Random) -> None:
        """Close a handle or mapping."""
        if self._kept:
            self._let_go(self._kept.pop(chosen.randrange(len(self._kept))))

    def compare_all(self) -> None:
        """Everything, at the end."""
        for place in list(self._all()):
            self._soon(lambda place=place: self._compare_stat(place))  # type: ignore[misc]
        for kept in self._kept:
            if kept.snapshot is None and kept.mapped is None:
                self._soon(lambda kept=kept: self._use_handle(kept))  # type: ignore[misc]

    def close(self) -> None:
        """Let everything go."""
        while self._kept:
            self._let_go(self._kept.pop())


CHANGES: Final = (
    "create", "create_weights", "replace_file", "edit", "append", "truncate", "chmod", "set_xattr", "link", "symlink",
    "mkdir", "rename", "unlink", "rmdir",
)  # fmt: skip
USES: Final = (
    "look", "look_for_nothing", "list_folder", "read_link", "read_xattr", "read_file", "read_view", "keep_open",
    "keep_mapped", "keep_view", "use_kept", "let_go",
)  # fmt: skip


def _differ(what: str, seen: bytes, wanted: bytes | bytearray) -> str:
    at = next((at for at, (a, b) in enumerate(zip(seen, wanted, strict=False)) if a != b), min(len(seen), len(wanted)))
    return f"{what}: {len(seen)} bytes instead of {len(wanted)}, different from {at} on"
