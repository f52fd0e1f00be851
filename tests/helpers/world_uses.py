"""What is done on a mount: each operation compares what it shows with the model."""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import time
from collections.abc import Callable
from typing import Final

from tests.helpers.world_model import MOST_BYTES, Kept, Model, Node, Place

_MOST_KEPT: Final = 8
_PAGE: Final = 4096


class Uses(Model):
    """Operations on the mount, one of `USES` each."""

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
            self._keep(Kept(node, fd, snapshot=snapshot, version=node.version))

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
            seen = os.pread(kept.fd, MOST_BYTES * 2, 0)
        except OSError as e:
            if e.errno != errno.ESTALE or not self._cuts_are_stale:
                raise
            self.stale += 1  # it was cut while it was open
            return
        if self._cuts_are_stale and seen and len(seen) % _PAGE == 0 and seen == kept.node.content[: len(seen)]:
            return  # it was cut while it was open: what the kernel had cached, and then ESTALE
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


USES: Final = (
    "look", "look_for_nothing", "list_folder", "read_link", "read_xattr", "read_file", "read_view", "keep_open",
    "keep_mapped", "keep_view", "use_kept", "let_go",
)  # fmt: skip


def _differ(what: str, seen: bytes, wanted: bytes | bytearray) -> str:
    at = next((at for at, (a, b) in enumerate(zip(seen, wanted, strict=False)) if a != b), min(len(seen), len(wanted)))
    return f"{what}: {len(seen)} bytes instead of {len(wanted)}, different from {at} on"
