"""The part of the FUSE wire protocol that the channel reads or writes itself. Numbers and structures only.

Source: the kernel's `include/uapi/linux/fuse.h`, protocol 7.31 and later, little-endian machines.
"""

from __future__ import annotations

import enum
import struct
from typing import Final


class Opcode(enum.IntEnum):
    """Requests that get special treatment."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    READDIRPLUS = 44
    STATX = 52


NO_REPLY: Final = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
"""Requests that the kernel expects no answer to."""

IN_HEADER: Final = struct.Struct("<IIQQ")
"""length, opcode, unique, nodeid; the whole header has 40 bytes."""
IN_HEADER_BYTES: Final = 40
OUT_HEADER: Final = struct.Struct("<IiQ")
"""length, error (0 or a negative errno), unique. `unique` 0 marks a notification."""
OUT_HEADER_BYTES: Final = 16

NOTIFY_INVAL_INODE: Final = 2
NOTIFY_INVAL_ENTRY: Final = 3
NOTIFY_INC_EPOCH: Final = 8  # Linux 6.16
INVAL_INODE_OUT: Final = struct.Struct("<Qqq")
"""inode, offset (negative: attributes only), length (0: to the end)."""
INVAL_ENTRY_OUT: Final = struct.Struct("<QII")
"""folder, length of the name, flags; the name and a NUL follow."""
FUSE_EXPIRE_ONLY: Final = 1 << 0  # Linux 6.2

READ_IN: Final = struct.Struct("<QQI")
"""fh, offset, size: also READDIR's and READDIRPLUS's, and RELEASE's fh."""
READ_SIZE_AT: Final = IN_HEADER_BYTES + 16
XATTR_SIZE_AT: Final = IN_HEADER_BYTES
OPEN_OUT: Final = struct.Struct("<QIi")
"""fh, open_flags, backing_id."""

FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_NOFLUSH: Final = 1 << 5
FOPEN_PASSTHROUGH: Final = 1 << 7

INIT_FLAGS_AT: Final = 12
INIT_MAX_BACKGROUND_AT: Final = 16
INIT_MAX_WRITE_AT: Final = 20
INIT_MAX_PAGES_AT: Final = 28
INIT_FLAGS2_AT: Final = 32
INIT_STACK_DEPTH_AT: Final = 36
INIT_IN_FLAGS_AT: Final = IN_HEADER_BYTES + 12
INIT_IN_FLAGS2_AT: Final = IN_HEADER_BYTES + 16
FUSE_PARALLEL_DIROPS: Final = 1 << 18
FUSE_MAX_PAGES: Final = 1 << 22
FUSE_INIT_EXT: Final = 1 << 30
FUSE2_PASSTHROUGH: Final = 1 << 5  # bit 37
FUSE2_HAS_RESEND: Final = 1 << 7  # bit 39
FUSE2_ALLOW_IDMAP: Final = 1 << 8  # bit 40, Linux 6.12: whoever may can map the mount's owners for a container

NOTIFY_RESEND: Final = OUT_HEADER.pack(OUT_HEADER_BYTES, 7, 0)
"""Everything the kernel has had no answer to comes again (Linux 6.9)."""
UNIQUE_RESEND: Final = 1 << 63
"""Set in the `unique` of a request that came again; a reply must have it as well."""

BACKING_OPEN: Final = 0x4010E501
BACKING_CLOSE: Final = 0x4004E502
BACKING_MAP: Final = struct.Struct("<iIQ")
"""fd, flags, padding."""
