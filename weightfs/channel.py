"""The kernel's side of the mount: owns /dev/fuse and stands between it and stock pyfuse3.

pyfuse3 is given one end of a SOCK_SEQPACKET pair for its mountpoint (libfuse takes `/dev/fd/N`) and believes it to be
the kernel. Requests and replies pass through here as they are, with these exceptions:

    INIT reply      completed by `negotiation.py`
    OPEN            its handle, and the reply, come from `opens.py`
    READ            answered by the threads of `reads.py`
    RELEASE, FLUSH  answered here: they concern handles only
    OPENDIR         answered ENOSYS here: the kernel then opens folders by itself and caches their listings for as long
                    as their mtime stays the same
    READDIRPLUS     carries the inode number as its handle, since folders are never opened; the last one, to which the
                    answer is that there is no more, is answered here
    INTERRUPT       dropped: nothing here can be interrupted, and libfuse would never find a READ's request

A successor lets its pyfuse3 answer the INIT of its predecessor's. Then the kernel is asked to send again what it had no
answer to. What comes again is tried one at a time (`suspects.py`); what a second daemon dies of is answered EIO.

Every request has a deadline and room for its reply (`outstanding.py`): one that is not answered by then is answered
EIO, and its late reply is dropped.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from weightfs import wire
from weightfs.handles import HandleTable
from weightfs.kernel import Kernel
from weightfs.ledger import Ledger
from weightfs.negotiation import Negotiation
from weightfs.opens import Opens
from weightfs.outstanding import Outstanding
from weightfs.reads import Reads
from weightfs.suspects import Suspects
from weightfs.wire import Opcode

log = logging.getLogger(__name__)

_REQUEST_BYTES: Final = 64 << 10
"""Size of the buffer the kernel is read with: bounds a batch of FORGETs, and must exceed `max_write` (4096) by far."""
_REPLY_BYTES: Final = 32 << 10
"""Largest listing taken at once; larger requests are cut, as a file system may."""
_SMALL_REPLY_BYTES: Final = 8 << 10
"""What any other reply takes in the socket at most: a symlink's target (4 KiB) and the kernel's own overhead."""
_PAIR_BYTES: Final = 4 << 20
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_NOT_WANTED: Final = frozenset({Opcode.FLUSH, Opcode.OPENDIR})
_TICK_S: Final = 0.25
_DRAIN_S: Final = 0.3
_LOST_IDS: Final = 64  # backing ids above the last one noted that a daemon may have made and not noted as it died


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelConfig:
    """Settings of a channel.

    Attributes:
        passthrough: ask the kernel for it; whether it agreed is in `Channel.passthrough`.
        stack_depth: 1, or 2 where the source itself lies on a stacked filesystem (then none can be stacked on us).
        deadline_s: see the module.
        threads: how many READs are answered at once.
        max_background: how many readahead requests the kernel may have under way.
    """

    passthrough: bool
    stack_depth: int = 1
    deadline_s: float = 30.0
    threads: int = 4
    max_background: int = 64


class Channel:
    """One mount's connection to the kernel.

    Args:
        kernel_fd: /dev/fuse, mounted, non-blocking; stays the caller's.
        handles: OPEN adds to it, RELEASE discards from it.
        listing_end: the cookie behind which a folder's listing, as last given, has no more entries; None if not known.
        reopen, errno_of: see `Reads`; the table of errnos belongs to the FUSE adapter.
        ledger: what a predecessor left and a successor needs.

    Attributes:
        ready: the kernel has its INIT reply, or had it from a predecessor.
        requests: number by opcode, passthrough reads never among them.
        fallbacks: see `Kernel`.
        expired: requests answered EIO at their deadline.
    """

    def __init__(
        self,
        kernel_fd: int,
        handles: HandleTable,
        listing_end: Callable[[int], int | None],
        reopen: Callable[[int], Awaitable[object]],
        errno_of: Callable[[BaseException], int],
        ledger: Ledger,
        config: ChannelConfig,
    ) -> None:
        self._kernel = Kernel(kernel_fd)
        self._handles = handles
        self._opens = Opens(self._kernel, handles)
        self._listing_end = listing_end
        self._ledger = ledger
        self._config = config
        self._theirs, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._theirs, self._ours):
            end.setblocking(False)
            for forced, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
                try:
                    end.setsockopt(socket.SOL_SOCKET, forced, _PAIR_BYTES)
                except PermissionError:
                    end.setsockopt(socket.SOL_SOCKET, plain, _PAIR_BYTES)
        # Half of it: the kernel charges each message for its own structures as well.
        room_bytes = self._theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
        self._outstanding = Outstanding(room_bytes, config.deadline_s, ledger)
        self._reads = Reads(self._kernel, handles, self._outstanding, reopen, errno_of)
        self._negotiation = Negotiation(
            ledger,
            passthrough=config.passthrough,
            stack_depth=config.stack_depth,
            max_background=config.max_background,
        )
        self.ready = trio.Event()
        self._retiring = trio.CancelScope()
        self.requests: Counter[int] = Counter()
        self.fallbacks = self._kernel.fallbacks
        self.expired = 0
        self._suspects = Suspects(ledger, self._outstanding)

    @property
    def passthrough(self) -> bool | None:
        """Whether the kernel agreed to it; None before INIT."""
        return self._negotiation.passthrough

    @property
    def resends(self) -> bool:
        """Whether the kernel sends again what a daemon that died had not answered (Linux 6.9)."""
        return self._negotiation.resends

    @property
    def poisoned(self) -> int:
        """Requests answered EIO because two daemons died of them."""
        return self._suspects.poisoned

    @property
    def bytes_read(self) -> int:
        """Bytes given in READ replies."""
        return self._reads.bytes_read

    @property
    def hints(self) -> int:
        """READs of files that the kernel reads by itself: `readahead` and WILLNEED through the mount, which fill a
        second cache that nobody reads."""
        return self._reads.hints

    def observed_reads(self, count: int) -> tuple[list[list[int]], int]:
        """See `Reads.observed`."""
        return self._reads.observed(count)

    @property
    def mountpoint(self) -> str:
        """What pyfuse3 is to be given as mountpoint."""
        return f"/dev/fd/{self._theirs.fileno()}"

    def is_asked(self) -> bool:
        """Whether a request waits for its answer. Callable from any thread."""
        return len(self._outstanding) > 0

    def held_s(self, nodeid: int) -> float:
        """For how long the oldest LOOKUP or listing of a folder has waited, with the kernel's lock of that folder.

        Callable from any thread.
        """
        return self._outstanding.held_s(nodeid)

    def abandon(self) -> None:
        """Answer EIO to whoever waits: for an end after which nobody answers any more.

        A thread of ours may wait in the kernel for a lock that one of them holds, and could not end before.
        """
        for unique in [*self._suspects.empty(), *(unique for unique, _ in self._outstanding.settle_all())]:
            self._kernel.answer(unique, errno.EIO)

    async def run(self, may_read: Callable[[], Awaitable[Sequence[int]]]) -> None:
        """Carry messages until the filesystem is unmounted, or `retire`.

        `may_read` returns once no other daemon reads the kernel's requests, and gives backing ids that a predecessor
        left behind; before it, pyfuse3 has answered INIT if that is known already.

        Raises:
            UnfitError: INIT would be answered differently from what the kernel was told.
        """
        self._reads.start(self._config.threads)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._carry_replies)
                if self._ledger.init_request:
                    await self._repeat_init(self._ledger.init_request)
                left_behind = await may_read()
                if self._ledger.init_request:
                    self._resume(left_behind)
                nursery.start_soon(self._watch_deadlines)
                nursery.start_soon(self._suspects.try_them, partial(self._take, nursery))
                with self._retiring:
                    await self._carry_requests(nursery)
                if self._retiring.cancelled_caught:
                    await self._drain()
                nursery.cancel_scope.cancel()
        finally:
            self._reads.stop()

    def retire(self) -> None:
        """Read no more; `run` returns when what was read is answered, or soon. What is not comes to the successor."""
        self._retiring.cancel()

    async def _drain(self) -> None:
        with trio.move_on_after(_DRAIN_S):
            while self._outstanding:  # noqa: ASYNC110 - threads settle too, and can't set an event
                await trio.sleep(0.005)

    async def _repeat_init(self, message: bytes) -> None:
        buffer = bytearray(message)
        _, opcode, unique, nodeid = wire.IN_HEADER.unpack_from(buffer)
        await self._forward(opcode, unique, nodeid, buffer, memoryview(buffer))
        with trio.fail_after(self._config.deadline_s):
            await self.ready.wait()

    def _resume(self, left_behind: Sequence[int]) -> None:
        """Take over what the kernel believes of a predecessor."""
        if not self._ledger.is_answered:
            self._kernel.write([self._ledger.init_reply])  # ENOENT where the predecessor did it before it died
            self._ledger.init_answered()
        if self.passthrough:
            last = self._ledger.last_backing_id
            for number in (*left_behind, *range(last + 1, last + 1 + _LOST_IDS)):
                self._kernel.close_backing(number)
        if self.resends:
            self._kernel.write([wire.NOTIFY_RESEND])

    def close(self) -> None:
        """Close both ends of the pair; pyfuse3 must be through with its own."""
        self._ours.close()
        # libfuse closed its descriptor, whose number may be another file's by now.
        self._theirs.detach()

    # From the kernel

    async def _carry_requests(self, nursery: trio.Nursery) -> None:
        buffer = bytearray(_REQUEST_BYTES)
        view = memoryview(buffer)
        while True:
            try:
                size = os.readv(self._kernel.fd, [buffer])
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._kernel.fd)
                continue
            except OSError as e:
                if e.errno == errno.ENODEV:  # unmounted
                    return
                if e.errno in (errno.EINTR, errno.ENOENT):  # ENOENT: taken back before we had it
                    continue
                raise
            _, opcode, unique, nodeid = wire.IN_HEADER.unpack_from(buffer)
            self.requests[opcode] += 1
            if not unique & wire.UNIQUE_RESEND or opcode == Opcode.RELEASE:
                await self._take(nursery, buffer, size)
            elif self._suspects.is_guilty(opcode, unique, nodeid):
                self._kernel.answer(unique, errno.EIO)
            else:
                self._suspects.add(unique, view[:size])

    async def _take(self, nursery: trio.Nursery, buffer: bytearray, size: int) -> None:
        _, opcode, unique, nodeid = wire.IN_HEADER.unpack_from(buffer)
        if opcode == Opcode.READ:
            self._reads.take(nursery, buffer, unique, nodeid)
        elif opcode == Opcode.RELEASE:
            (handle,) = struct.unpack_from("<Q", buffer, wire.IN_HEADER_BYTES)
            self._handles.discard(nodeid, handle)
            self._kernel.answer(unique, 0)
        elif opcode in _NOT_WANTED:
            self._kernel.answer(unique, errno.ENOSYS)  # which tells the kernel not to send any more
        elif opcode == Opcode.READDIRPLUS and self._is_at_end(nodeid, buffer):
            self._kernel.write([wire.OUT_HEADER.pack(wire.OUT_HEADER_BYTES, 0, unique)])
        elif opcode != Opcode.INTERRUPT:
            await self._forward(opcode, unique, nodeid, buffer, memoryview(buffer)[:size])

    def _is_at_end(self, nodeid: int, buffer: bytearray) -> bool:
        _, cookie, _ = wire.READ_IN.unpack_from(buffer, wire.IN_HEADER_BYTES)
        return bool(cookie) and self._listing_end(nodeid) == cookie

    async def _forward(self, opcode: int, unique: int, nodeid: int, buffer: bytearray, message: memoryview) -> None:
        if opcode not in wire.NO_REPLY:
            reserved = _reply_bytes(opcode, buffer)
            await self._outstanding.reserve(reserved)
            self._outstanding.add(unique, opcode, nodeid, reserved)
        if opcode == Opcode.OPEN:
            self._opens.begin(nodeid, unique)
        elif opcode in (Opcode.READDIR, Opcode.READDIRPLUS):
            struct.pack_into("<Q", buffer, wire.IN_HEADER_BYTES, nodeid)
        elif opcode == Opcode.INIT:
            self._negotiation.begin(message)
        while True:
            try:
                self._ours.send(message)
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._ours)

    # To the kernel

    async def _carry_replies(self) -> None:
        buffer = bytearray(_REPLY_BYTES + _REQUEST_BYTES)
        view = memoryview(buffer)
        while True:
            try:
                size = self._ours.recv_into(buffer)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._ours)
                continue
            if size == 0:
                return
            _, error, unique = wire.OUT_HEADER.unpack_from(buffer)
            pending = self._outstanding.settle(unique)
            if pending is None:
                continue  # its deadline has passed
            self._outstanding.give_back(pending)
            if pending.opcode == Opcode.OPEN:
                may_pass = bool(self._negotiation.passthrough)
                self._opens.answer(buffer, view[:size], error, unique, pending.nodeid, passthrough=may_pass)
            elif pending.opcode == Opcode.INIT and not error:
                self._negotiation.complete(buffer)
                self._carry_init(view[:size])
            else:
                self._kernel.write([view[:size]])

    def _carry_init(self, message: memoryview) -> None:
        if self._negotiation.is_first(message):
            self._kernel.write([message])
            self._ledger.init_answered()
        self.ready.set()

    # Deadlines

    async def _watch_deadlines(self) -> None:
        while True:
            self._ledger.beat()
            await trio.sleep(_TICK_S)
            for unique, request in self._outstanding.settle_all(before=trio.current_time()):
                self.expired += 1
                if request.opcode == Opcode.OPEN:
                    self._opens.give_up(request.nodeid, unique)
                self._kernel.answer(unique, errno.EIO)
                log.warning("request %d of inode %#x had no answer in time", request.opcode, request.nodeid)


def _reply_bytes(opcode: int, buffer: bytearray) -> int:
    """What the reply may take in the socket; a listing larger than our limit is cut in the request itself."""
    if opcode in (Opcode.READDIR, Opcode.READDIRPLUS):
        (size,) = struct.unpack_from("<I", buffer, wire.READ_SIZE_AT)
        struct.pack_into("<I", buffer, wire.READ_SIZE_AT, min(size, _REPLY_BYTES))
        return min(int(size), _REPLY_BYTES) + _SMALL_REPLY_BYTES
    if opcode in (Opcode.GETXATTR, Opcode.LISTXATTR):
        (size,) = struct.unpack_from("<I", buffer, wire.XATTR_SIZE_AT)
        return min(int(size), _REQUEST_BYTES) + _SMALL_REPLY_BYTES
    return _SMALL_REPLY_BYTES
