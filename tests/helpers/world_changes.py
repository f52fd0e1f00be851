"""What may happen to a source: each operation is made on the bare folder, and in the model."""

from __future__ import annotations

import os
import random
import stat
from typing import Final

from tests.helpers.models import Tensor, safetensors_bytes
from tests.helpers.world_model import MOST_BYTES, NAMES, Model, Node

_MODES: Final = (0o644, 0o600, 0o444, 0o755)
_MOST_DEPTH: Final = 4


class Changes(Model):
    """Operations on the source, one of `CHANGES` each."""

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
            node = Node(stat.S_IFLNK, target=chosen.choice([other for other in NAMES if other != name]))
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
        data = chosen.randbytes(chosen.choice([0, 1, 4096, chosen.randrange(MOST_BYTES)]))
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


CHANGES: Final = (
    "create", "create_weights", "replace_file", "edit", "append", "truncate", "chmod", "set_xattr", "link", "symlink",
    "mkdir", "rename", "unlink", "rmdir",
)  # fmt: skip
