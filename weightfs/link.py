"""The socket between the supervisor and a daemon: whole messages, some with descriptors.

Two kinds travel on it. *Words* are JSON objects, a few in a daemon's life:

    supervisor -> daemon    {"start": {...}}, {"held": [inode, ...]} with descriptors, {"go": {...}}, {"retire": {}}
    daemon -> supervisor    {"prepared": {...}}, {"serving": {...}}, {"error": {...}}

*Holdings* are 9 bytes, one with each open and each last release: the supervisor keeps a descriptor of every file that
is open, so that a successor can read one whose name is gone. Source: unix(7), SCM_RIGHTS.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

_HOLDING: Final = struct.Struct("<cQ")
_HOLD, _DROP = b"h", b"d"
_MESSAGE_BYTES: Final = 128 << 10
MOST_DESCRIPTORS: Final = 250
"""In one message: the kernel takes 253."""


class Message(NamedTuple):
    """What came.

    Attributes:
        words: a JSON object, None for a holding.
        hold: an inode whose descriptor comes with it, or None.
        drop: an inode whose descriptor is to be closed, or None.
        fds: descriptors, the receiver's to close.
    """

    words: dict[str, Any] | None
    hold: int | None
    drop: int | None
    fds: list[int]


class Link:
    """One end. Runs on one thread; sending never waits: what the other side has not room for follows later."""

    def __init__(self, end: socket.socket) -> None:
        """Take over a SOCK_SEQPACKET socket."""
        end.setblocking(False)
        self._socket = end
        self._late: deque[tuple[bytes, list[int]]] = deque()

    @staticmethod
    def pair() -> tuple[Link, socket.socket]:
        """Our end, and the one to be inherited by the other side."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        return Link(ours), theirs

    def fileno(self) -> int:
        """For poll(2)."""
        return self._socket.fileno()

    def say(self, words: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a JSON object; the descriptors stay the caller's."""
        self._send(json.dumps(words).encode(), fds)

    def hold(self, inode: int, fd: int) -> None:
        """Ask the other side to keep a descriptor; it stays the caller's as well."""
        self._send(_HOLDING.pack(_HOLD, inode), [fd])

    def drop(self, inode: int) -> None:
        """Ask it to close what it keeps for an inode."""
        self._send(_HOLDING.pack(_DROP, inode), ())

    def receive(self) -> Message | None:
        """The next message; None when the other side has gone.

        Raises:
            BlockingIOError: nothing has come.
        """
        try:
            data, ancillary, _, _ = self._socket.recvmsg(
                _MESSAGE_BYTES, socket.CMSG_SPACE(4 * MOST_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return None
        fds: list[int] = []
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                got = array.array("i")
                got.frombytes(payload[: len(payload) - len(payload) % got.itemsize])
                fds += got
        if not data:
            for fd in fds:
                os.close(fd)
            return None
        if len(data) == _HOLDING.size and data[:1] in (_HOLD, _DROP):
            kind_of, inode = _HOLDING.unpack(data)
            return Message(None, inode, None, fds) if kind_of == _HOLD else Message(None, None, inode, fds)
        return Message(json.loads(data), None, None, fds)

    def flush(self) -> bool:
        """Send what had to wait; False while some of it still has to."""
        while self._late:
            data, fds = self._late[0]
            if not self._try(data, fds):
                return False
            self._late.popleft()
            for fd in fds:
                os.close(fd)
        return True

    def close(self) -> None:
        """Give it up, with what is still to be sent."""
        for _, fds in self._late:
            for fd in fds:
                os.close(fd)
        self._late.clear()
        self._socket.close()

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        if not self.flush() or not self._try(data, fds):
            self._late.append((data, [os.dup(fd) for fd in fds]))

    def _try(self, data: bytes, fds: Sequence[int]) -> bool:
        """Send one message; False when there is no room. A side that has gone takes everything."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(ConnectionError):
            try:
                self._socket.sendmsg([data], rights)
            except BlockingIOError:
                return False
        return True
