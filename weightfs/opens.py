"""OPEN: its handle, and the backing id by which the kernel reads a whole file by itself.

A handle is the OPEN's own number, so one that comes again to a successor makes no second handle.
"""

from __future__ import annotations

import errno

from weightfs import wire
from weightfs.handles import HandleTable, OpenInode
from weightfs.kernel import Kernel


class Opens:
    """The OPENs of one mount; gives the kernel its backing ids back when their inodes' last handles end."""

    def __init__(self, kernel: Kernel, handles: HandleTable) -> None:
        self._kernel = kernel
        self._handles = handles
        handles.closing = self._close_backing

    def begin(self, nodeid: int, unique: int) -> None:
        """An OPEN has come."""
        self._handles.add(nodeid, _handle_of(unique))

    def give_up(self, nodeid: int, unique: int) -> None:
        """It was answered with an error."""
        self._handles.discard(nodeid, _handle_of(unique))

    def answer(
        self, buffer: bytearray, message: memoryview, error: int, unique: int, nodeid: int, *, passthrough: bool
    ) -> None:
        """Complete pyfuse3's reply and give it to the kernel.

        Args:
            buffer: begins with the reply.
            message: that part of the buffer.
            error: of the reply, 0 for success.
            unique, nodeid: of the request.
            passthrough: whether the kernel may read files by itself.
        """
        handle = _handle_of(unique)
        if error:
            self._handles.discard(nodeid, handle)
            self._kernel.write([message])
        elif not self._complete(buffer, handle, nodeid, passthrough):
            self._handles.discard(nodeid, handle)
            self._kernel.answer(unique, errno.ENFILE)
        elif not self._kernel.write([message]):
            self._handles.discard(nodeid, handle)  # nobody is left to release it

    def _complete(self, buffer: bytearray, handle: int, nodeid: int, passthrough: bool) -> bool:
        """Complete a reply; False when its handle can't be noted for a successor."""
        _, flags, _ = wire.OPEN_OUT.unpack_from(buffer, wire.OUT_HEADER_BYTES)
        flags |= wire.FOPEN_NOFLUSH
        backing_id = 0
        entry = self._handles.get(nodeid)
        if entry is not None:
            if passthrough and not entry.settled and entry.backing_fd is not None:
                entry.backing_id = self._kernel.open_backing(entry.backing_fd)
            if not self._handles.settle(nodeid, entry):
                return False
            if entry.backing_id is not None:
                backing_id = entry.backing_id
                flags = flags & ~wire.FOPEN_KEEP_CACHE | wire.FOPEN_PASSTHROUGH
        wire.OPEN_OUT.pack_into(buffer, wire.OUT_HEADER_BYTES, handle, flags, backing_id)
        return self._handles.answer(nodeid, handle)

    def _close_backing(self, entry: OpenInode) -> None:
        if entry.backing_id is not None:
            self._kernel.close_backing(entry.backing_id)


def _handle_of(unique: int) -> int:
    """An OPEN's handle: its number, whether it came again or not."""
    return unique & ~wire.UNIQUE_RESEND
