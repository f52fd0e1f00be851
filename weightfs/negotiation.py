"""INIT: what libfuse 3.14 does not know to negotiate with the kernel, and how a successor negotiates the very same.

A successor's pyfuse3 is given the INIT that its predecessor was given, and its reply goes nowhere.
"""

from __future__ import annotations

import struct

from weightfs import wire
from weightfs.errors import UnfitError
from weightfs.ledger import Ledger
from weightfs.reads import READ_BYTES


class Negotiation:
    """One mount's INIT.

    Args:
        ledger: keeps request and reply for a successor.
        passthrough: see `ChannelConfig`.
        stack_depth: see there.
        max_background: see there.

    Attributes:
        passthrough: whether the kernel agreed; None before its request.
    """

    def __init__(self, ledger: Ledger, *, passthrough: bool, stack_depth: int, max_background: int) -> None:
        self._ledger = ledger
        self._wants_passthrough = passthrough
        self._stack_depth = stack_depth
        self._max_background = max_background
        self.passthrough: bool | None = None

    @property
    def resends(self) -> bool:
        """Whether the kernel sends again what a daemon that died had not answered (Linux 6.9)."""
        return bool(_flags2(self._ledger.init_request) & wire.FUSE2_HAS_RESEND)

    def begin(self, request: memoryview) -> None:
        """The kernel's request is on its way to pyfuse3, for the first time or again."""
        if not self._ledger.init_request:
            self._ledger.init_request = bytes(request)
        self.passthrough = self._wants_passthrough and bool(_flags2(request) & wire.FUSE2_PASSTHROUGH)

    def complete(self, reply: bytearray) -> None:
        """Add to pyfuse3's reply what is negotiated beyond it."""
        at = wire.OUT_HEADER_BYTES
        flags, background, flags2 = (
            struct.unpack_from(form, reply, at + offset)[0]
            for form, offset in (
                ("<I", wire.INIT_FLAGS_AT),
                ("<H", wire.INIT_MAX_BACKGROUND_AT),
                ("<I", wire.INIT_FLAGS2_AT),
            )
        )
        # Without parallel operations one LOOKUP that waits keeps every other out of its folder.
        flags |= wire.FUSE_INIT_EXT | wire.FUSE_MAX_PAGES | wire.FUSE_PARALLEL_DIROPS
        background = max(background, self._max_background)
        struct.pack_into("<I", reply, at + wire.INIT_FLAGS_AT, flags)
        struct.pack_into("<HH", reply, at + wire.INIT_MAX_BACKGROUND_AT, background, background * 3 // 4)
        struct.pack_into("<I", reply, at + wire.INIT_MAX_WRITE_AT, 4096)
        struct.pack_into("<H", reply, at + wire.INIT_MAX_PAGES_AT, READ_BYTES // 4096)
        flags2 |= _flags2(self._ledger.init_request) & (wire.FUSE2_HAS_RESEND | wire.FUSE2_ALLOW_IDMAP)
        if self.passthrough:
            flags2 |= wire.FUSE2_PASSTHROUGH
            struct.pack_into("<I", reply, at + wire.INIT_STACK_DEPTH_AT, self._stack_depth)
        struct.pack_into("<I", reply, at + wire.INIT_FLAGS2_AT, flags2)

    def is_first(self, reply: memoryview) -> bool:
        """Whether the kernel is to be given a completed reply, which is noted then; else it has had the very same.

        Raises:
            UnfitError: it has had another one.
        """
        if not self._ledger.init_reply:
            self._ledger.init_reply = bytes(reply)
            return True
        if self._ledger.init_reply != reply:
            raise UnfitError(
                "this version would negotiate something else with the kernel than the running one did",
                mend="umount it, then mount again",
            )
        return False


def _flags2(init: bytes | memoryview) -> int:
    """The upper half of the flags that the kernel offers in INIT; 0 where it has none."""
    if len(init) < wire.INIT_IN_FLAGS2_AT + 4:
        return 0
    flags, flags2 = struct.unpack_from("<II", init, wire.INIT_IN_FLAGS_AT)
    return int(flags2) if flags & wire.FUSE_INIT_EXT else 0
