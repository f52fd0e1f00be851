"""Headers of files that changed a moment ago: too young for the index, and yet a successor needs them.

Within 2 s of a change a file may change again without its times showing it, so what its header said then is never
recorded. But views of it may be open. Their numbers, and what they stand for, are noted in the journal alone, which
lives as long as the mount; each read compares the file's identity, as it does in the process that parsed the header.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import msgspec

from weightfs.index.schema import FileRecord

ROOM: Final = b"young"
_MOST: Final = 256  # files; the kernel holds on to no more views of files that never come to rest


class YoungFile(msgspec.Struct, frozen=True, array_like=True):
    """What a run of views stands for.

    Attributes:
        identity: of the content.
        path: where the file was found, relative to the root, symlinks resolved.
        name: what it is called where it was found.
        record: what its header said.
    """

    identity: bytes
    path: bytes
    name: str
    record: FileRecord


class YoungFiles:
    """Those of one mount, by the first number of their views. The index guards it with its own lock.

    Args:
        append: notes a record in the journal.
    """

    def __init__(self, append: Callable[[bytes, bytes, bytes], object]) -> None:
        self._append = append
        self._files: OrderedDict[int, bytes] = OrderedDict()

    def put(self, file: YoungFile) -> None:
        """Note a file, for a successor as well."""
        base, encoded = file.record.base, msgspec.msgpack.encode(file)
        if self._files.get(base) != encoded:
            self._append(ROOM, _key(base), encoded)
        self._files[base] = encoded
        self._files.move_to_end(base)
        if len(self._files) > _MOST:
            self._files.popitem(last=False)

    def drop(self, base: int) -> None:
        """It is in the index now."""
        self._files.pop(base, None)

    def take_over(self, key: bytes, encoded: bytes) -> None:
        """One that a predecessor had noted."""
        self._files[int.from_bytes(key, "big")] = encoded

    def note_again(self) -> None:
        """The journal was emptied."""
        for base, encoded in self._files.items():
            self._append(ROOM, _key(base), encoded)

    def find(self, inode: int) -> YoungFile | None:
        """The file in whose run of views `inode` lies."""
        below = [base for base in self._files if base <= inode]
        if not below:
            return None
        try:
            file = msgspec.msgpack.decode(self._files[max(below)], type=YoungFile)
        except msgspec.MsgspecError:  # a predecessor of another version wrote it
            return None
        return file if inode < file.record.base + 2 * len(file.record.tensors) else None


def _key(base: int) -> bytes:
    return base.to_bytes(8, "big")
