"""The kernel's side of the mount: owns /dev/fuse and stands between it and stock pyfuse3.

pyfuse3 is given one end of a SOCK_SEQPACKET pair for its mountpoint (libfuse takes `/dev/fd/N`) and believes it to be
the kernel. Requests and replies pass through here as they are, with these exceptions:

    INIT reply      negotiates what libfuse 3.14 does not know: passthrough, a larger queue
    OPEN            makes its `unique` the handle; the reply gets a backing id where the kernel may read by itself
    READ            answered here, by threads that hold no GIL while they wait or copy
    RELEASE, FLUSH  answered here: they concern handles only
    OPENDIR         answered ENOSYS here: the kernel then opens folders by itself and caches their listings for as long
                    as their mtime stays the same
    READDIRPLUS     carries the inode number as its handle, since folders are never opened; the last one, to which the
                    answer is that there is no more, is answered here
    INTERRUPT       dropped: nothing here can be interrupted, and libfuse would never find a READ's request

A successor's pyfuse3 is given the INIT that its predecessor was given, and its reply goes nowhere. Then the kernel is
asked to send again what it had no answer to. A request that comes again after two daemons died is answered EIO: it may
be what they died of.

Every request has a deadline: one that is not answered by then is answered EIO, and its late reply is dropped.

Replies wait in the pair's buffer, and libfuse drops a reply that finds it full. So what may be under way is bounded:
each request reserves what its reply can take, and the kernel is not read while the reserve is used up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import queue
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from weightfs import wire
from weightfs.conduit import Conduit
from weightfs.errors import UnfitError
from weightfs.handles import HandleTable, OpenInode, Place, Readable
from weightfs.ledger import Ledger
from weightfs.wire import Opcode

log = logging.getLogger(__name__)

_REQUEST_BYTES: Final = 64 << 10
"""Size of the buffer the kernel is read with: bounds a batch of FORGETs, and must exceed `max_write` (4096) by far."""
_READ_BYTES: Final = 254 << 12
"""Largest READ. A pipe of 1 MiB, the most that every user may have, holds 256 pages: these, a header, and one more for
a range that begins within a page."""
_REPLY_BYTES: Final = 32 << 10
"""Largest listing taken at once; larger requests are cut, as a file system may."""
_SMALL_REPLY_BYTES: Final = 8 << 10
"""What any other reply takes in the socket at most: a symlink's target (4 KiB) and the kernel's own overhead."""
_PAIR_BYTES: Final = 4 << 20
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_NOT_WANTED: Final = frozenset({Opcode.FLUSH, Opcode.OPENDIR})
_OF_NAMES: Final = frozenset({Opcode.LOOKUP, Opcode.READDIR, Opcode.READDIRPLUS})
_TICK_S: Final = 0.25
_DRAIN_S: Final = 0.3
_POISONED: Final = 2  # deaths
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


@dataclass(slots=True)
class _Pending:
    opcode: int
    nodeid: int
    reserved_bytes: int
    expires: float
    since: float = field(default_factory=time.monotonic)


class Channel:
    """One mount's connection to the kernel.

    Args:
        kernel_fd: /dev/fuse, mounted, non-blocking; stays the caller's.
        handles: OPEN adds to it, RELEASE discards from it.
        listing_end: the cookie behind which a folder's listing, as last given, has no more entries; None if not known.
        reopen: attaches what serves an inode whose handle is known to the kernel but not to this process.
        errno_of: the errno for an exception; the table belongs to the FUSE adapter.
        ledger: what a predecessor left and a successor needs.

    Attributes:
        passthrough: whether the kernel agreed; None before INIT.
        requests: number by opcode, passthrough reads never among them.
        bytes_read: bytes given in READ replies.
        fallbacks: files the kernel would not read by itself, by errno.
        expired: requests answered EIO at their deadline.
        poisoned: requests answered EIO because two daemons died with them.
        hints: READs of files that the kernel reads by itself: `readahead` and WILLNEED through the mount, which fill a
            second cache that nobody reads.
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
        self._kernel = kernel_fd
        self._handles = handles
        handles.closing = self._close_backing
        self._listing_end = listing_end
        self._reopen = reopen
        self._errno_of = errno_of
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
        self._reserve_bytes = self._theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
        self._pending: dict[int, _Pending] = {}
        self._room = trio.Event()
        self._jobs: queue.SimpleQueue[tuple[int, Readable, int, int, int] | None] = queue.SimpleQueue()
        self.passthrough: bool | None = None
        self.ready = trio.Event()
        self._retiring = trio.CancelScope()
        self.requests: Counter[int] = Counter()
        self.fallbacks: Counter[int] = Counter()
        self.bytes_read = 0
        self.expired = 0
        self.poisoned = 0
        self.hints = 0

    @property
    def resends(self) -> bool:
        """Whether the kernel sends again what a daemon that died had not answered (Linux 6.9)."""
        return bool(_flags2(self._ledger.init_request) & wire.FUSE2_HAS_RESEND)

    @property
    def mountpoint(self) -> str:
        """What pyfuse3 is to be given as mountpoint."""
        return f"/dev/fd/{self._theirs.fileno()}"

    def held_s(self, nodeid: int) -> float:
        """For how long the oldest LOOKUP or listing of a folder has waited, with the kernel's lock of that folder.

        Callable from any thread.
        """
        asked = (p.since for p in list(self._pending.values()) if p.nodeid == nodeid and p.opcode in _OF_NAMES)
        return time.monotonic() - min(asked, default=time.monotonic())

    def abandon(self) -> None:
        """Answer EIO to whoever waits: for an end after which nobody answers any more.

        A thread of ours may wait in the kernel for a lock that one of them holds, and could not end before.
        """
        for unique, pending in list(self._pending.items()):
            if self._settle(unique):
                self._give_back(pending)
                self._reply_error(unique, errno.EIO)

    async def run(self, may_read: Callable[[], Awaitable[Sequence[int]]]) -> None:
        """Carry messages until the filesystem is unmounted, or `retire`.

        `may_read` returns once no other daemon reads the kernel's requests, and gives backing ids that a predecessor
        left behind; before it, pyfuse3 has answered INIT if that is known already.

        Raises:
            UnfitError: INIT would be answered differently from what the kernel was told.
        """
        threads = [
            threading.Thread(target=self._answer_reads, name=f"read-{number}", daemon=True)
            for number in range(self._config.threads)
        ]
        for thread in threads:
            thread.start()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._carry_replies)
                if self._ledger.init_request:
                    await self._repeat_init(self._ledger.init_request)
                left_behind = await may_read()
                if self._ledger.init_request:
                    self._resume(left_behind)
                nursery.start_soon(self._watch_deadlines)
                with self._retiring:
                    await self._carry_requests(nursery)
                if self._retiring.cancelled_caught:
                    await self._drain()
                nursery.cancel_scope.cancel()
        finally:
            for _ in threads:
                self._jobs.put(None)

    def retire(self) -> None:
        """Read no more; `run` returns when what was read is answered, or soon. What is not comes to the successor."""
        self._retiring.cancel()

    async def _drain(self) -> None:
        with trio.move_on_after(_DRAIN_S):
            while self._pending:  # noqa: ASYNC110 - threads settle too, and can't set an event
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
            self._write([self._ledger.init_reply])  # ENOENT where the predecessor did it before it died
            self._ledger.init_answered()
        if self.passthrough:
            last = self._ledger.last_backing_id
            for number in (*left_behind, *range(last + 1, last + 1 + _LOST_IDS)):
                self._close_backing_id(number)
        if self.resends:
            self._write([wire.NOTIFY_RESEND])

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
                size = os.readv(self._kernel, [buffer])
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._kernel)
                continue
            except OSError as e:
                if e.errno == errno.ENODEV:  # unmounted
                    return
                if e.errno in (errno.EINTR, errno.ENOENT):  # ENOENT: taken back before we had it
                    continue
                raise
            _, opcode, unique, nodeid = wire.IN_HEADER.unpack_from(buffer)
            self.requests[opcode] += 1
            if unique & wire.UNIQUE_RESEND and opcode != Opcode.RELEASE and self._is_poison(opcode, unique, nodeid):
                self._reply_error(unique, errno.EIO)
            elif opcode == Opcode.READ:
                self._take_read(nursery, buffer, unique, nodeid)
            elif opcode == Opcode.RELEASE:
                (handle,) = struct.unpack_from("<Q", buffer, wire.IN_HEADER_BYTES)
                self._handles.discard(nodeid, handle)
                self._reply_error(unique, 0)
            elif opcode in _NOT_WANTED:
                self._reply_error(unique, errno.ENOSYS)  # which tells the kernel not to send any more
            elif opcode == Opcode.READDIRPLUS and self._is_at_end(nodeid, buffer):
                self._write([wire.OUT_HEADER.pack(wire.OUT_HEADER_BYTES, 0, unique)])
            elif opcode != Opcode.INTERRUPT:
                await self._forward(opcode, unique, nodeid, buffer, view[:size])

    def _is_poison(self, opcode: int, unique: int, nodeid: int) -> bool:
        if self._ledger.deaths_seen(unique & ~wire.UNIQUE_RESEND) < _POISONED:
            return False
        self.poisoned += 1
        log.error("request %d of inode %#x has seen %d daemons die: answered EIO", opcode, nodeid, _POISONED)
        return True

    def _is_at_end(self, nodeid: int, buffer: bytearray) -> bool:
        _, cookie, _ = wire.READ_IN.unpack_from(buffer, wire.IN_HEADER_BYTES)
        return bool(cookie) and self._listing_end(nodeid) == cookie

    async def _forward(self, opcode: int, unique: int, nodeid: int, buffer: bytearray, message: memoryview) -> None:
        if opcode not in wire.NO_REPLY:
            reserved = _reply_bytes(opcode, buffer)
            await self._reserve(reserved)
            expires = trio.current_time() + self._config.deadline_s
            self._pending[unique] = _Pending(opcode, nodeid, reserved, expires)
        if opcode == Opcode.OPEN:
            self._handles.add(nodeid, _handle_of(unique))
        elif opcode in (Opcode.READDIR, Opcode.READDIRPLUS):
            struct.pack_into("<Q", buffer, wire.IN_HEADER_BYTES, nodeid)
        elif opcode == Opcode.INIT:
            if not self._ledger.init_request:
                self._ledger.init_request = bytes(message)
            self.passthrough = self._config.passthrough and bool(_flags2(message) & wire.FUSE2_PASSTHROUGH)
        while True:
            try:
                self._ours.send(message)
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._ours)

    async def _reserve(self, wanted_bytes: int) -> None:
        while self._pending and self._reserve_bytes < wanted_bytes:
            self._room = trio.Event()
            await self._room.wait()
        self._reserve_bytes -= wanted_bytes

    def _settle(self, unique: int) -> _Pending | None:
        """End a request, once: None for whoever comes second."""
        pending = self._pending.pop(unique, None)
        if pending is not None and unique & wire.UNIQUE_RESEND:
            self._ledger.resent_answered(unique & ~wire.UNIQUE_RESEND)
        return pending

    def _give_back(self, pending: _Pending) -> None:
        self._reserve_bytes += pending.reserved_bytes
        self._room.set()

    # READ

    def _take_read(self, nursery: trio.Nursery, buffer: bytearray, unique: int, nodeid: int) -> None:
        handle, offset, size = wire.READ_IN.unpack_from(buffer, wire.IN_HEADER_BYTES)
        expires = trio.current_time() + self._config.deadline_s
        self._pending[unique] = _Pending(Opcode.READ, nodeid, 0, expires)
        entry = self._handles.get(nodeid)
        if entry is not None and entry.readable is not None:
            self.hints += entry.backing_id is not None
            self._jobs.put((unique, entry.readable, handle, offset, size))
        else:
            nursery.start_soon(self._reopen_and_read, unique, nodeid, handle, offset, size)

    async def _reopen_and_read(self, unique: int, nodeid: int, handle: int, offset: int, size: int) -> None:
        self._handles.add(nodeid, handle)
        try:
            await self._reopen(nodeid)
        except Exception as e:  # noqa: BLE001 - whatever it is, the reader must hear of it, and the mount go on
            if self._settle(unique):
                self._reply_error(unique, self._errno_of(e))
            return
        entry = self._handles.get(nodeid)
        if entry is not None and entry.readable is not None:
            self._jobs.put((unique, entry.readable, handle, offset, size))
        elif self._settle(unique):
            self._reply_error(unique, errno.EIO)

    def _answer_reads(self) -> None:
        """A thread's life: splice, preadv and writev drop the GIL, so these copy in parallel."""
        buffer = memoryview(bytearray(_READ_BYTES))
        conduit = Conduit(self._kernel, _READ_BYTES)
        while (job := self._jobs.get()) is not None:
            unique, readable, handle, offset, size = job
            try:
                place = readable.in_page_cache(offset, min(size, _READ_BYTES))
                if place is not None and conduit.load(wire.OUT_HEADER, unique, place):
                    self._send_spliced(conduit, unique, place)
                    continue
                filled = readable.read_into(handle, buffer[: min(size, _READ_BYTES)], offset)
            except Exception as e:  # noqa: BLE001 - this thread must live on, and the reader hear of it
                if self._settle(unique):
                    self._reply_error(unique, self._errno_of(e))
                continue
            if self._settle(unique):
                self.bytes_read += filled
                self._write([wire.OUT_HEADER.pack(wire.OUT_HEADER_BYTES + filled, 0, unique), buffer[:filled]])

    def _send_spliced(self, conduit: Conduit, unique: int, place: Place) -> None:
        if not self._settle(unique):
            conduit.drop()
            return
        self.bytes_read += place.nbytes
        try:
            conduit.send()
        except OSError as e:
            self._refused(e)

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
            pending = self._settle(unique)
            if pending is None:
                continue  # its deadline has passed
            self._give_back(pending)
            if pending.opcode == Opcode.OPEN:
                self._carry_open(buffer, view[:size], error, unique, pending.nodeid)
            elif pending.opcode == Opcode.INIT and not error:
                self._patch_init(buffer)
                self._carry_init(view[:size])
            else:
                self._write([view[:size]])

    def _carry_open(self, buffer: bytearray, message: memoryview, error: int, unique: int, nodeid: int) -> None:
        handle = _handle_of(unique)
        if error:
            self._handles.discard(nodeid, handle)
            self._write([message])
        elif not self._patch_open(buffer, handle, nodeid):
            self._handles.discard(nodeid, handle)
            self._reply_error(unique, errno.ENFILE)
        elif not self._write([message]):
            self._handles.discard(nodeid, handle)  # nobody is left to release it

    def _carry_init(self, message: memoryview) -> None:
        if not self._ledger.init_reply:
            self._ledger.init_reply = bytes(message)
            self._write([message])
            self._ledger.init_answered()
        elif self._ledger.init_reply != message:
            raise UnfitError(
                "this version would negotiate something else with the kernel than the running one did",
                mend="umount it, then mount again",
            )
        self.ready.set()

    def _patch_init(self, buffer: bytearray) -> None:
        at = wire.OUT_HEADER_BYTES
        flags, background, flags2 = (
            struct.unpack_from(form, buffer, at + offset)[0]
            for form, offset in (
                ("<I", wire.INIT_FLAGS_AT),
                ("<H", wire.INIT_MAX_BACKGROUND_AT),
                ("<I", wire.INIT_FLAGS2_AT),
            )
        )
        # Without parallel operations one LOOKUP that waits keeps every other out of its folder.
        flags |= wire.FUSE_INIT_EXT | wire.FUSE_MAX_PAGES | wire.FUSE_PARALLEL_DIROPS
        background = max(background, self._config.max_background)
        struct.pack_into("<I", buffer, at + wire.INIT_FLAGS_AT, flags)
        struct.pack_into("<HH", buffer, at + wire.INIT_MAX_BACKGROUND_AT, background, background * 3 // 4)
        struct.pack_into("<I", buffer, at + wire.INIT_MAX_WRITE_AT, 4096)
        struct.pack_into("<H", buffer, at + wire.INIT_MAX_PAGES_AT, _READ_BYTES // 4096)
        flags2 |= _flags2(self._ledger.init_request) & (wire.FUSE2_HAS_RESEND | wire.FUSE2_ALLOW_IDMAP)
        if self.passthrough:
            flags2 |= wire.FUSE2_PASSTHROUGH
            struct.pack_into("<I", buffer, at + wire.INIT_STACK_DEPTH_AT, self._config.stack_depth)
        struct.pack_into("<I", buffer, at + wire.INIT_FLAGS2_AT, flags2)

    def _patch_open(self, buffer: bytearray, handle: int, nodeid: int) -> bool:
        """Complete the reply to an OPEN; False when its handle can't be noted for a successor."""
        _, flags, _ = wire.OPEN_OUT.unpack_from(buffer, wire.OUT_HEADER_BYTES)
        flags |= wire.FOPEN_NOFLUSH
        backing_id = 0
        entry = self._handles.get(nodeid)
        if entry is not None:
            if self.passthrough and not entry.settled and entry.backing_fd is not None:
                entry.backing_id = self._open_backing(entry.backing_fd)
            if not self._handles.settle(nodeid, entry):
                return False
            if entry.backing_id is not None:
                backing_id = entry.backing_id
                flags = flags & ~wire.FOPEN_KEEP_CACHE | wire.FOPEN_PASSTHROUGH
        wire.OPEN_OUT.pack_into(buffer, wire.OUT_HEADER_BYTES, handle, flags, backing_id)
        return self._handles.answer(nodeid, handle)

    def _open_backing(self, fd: int) -> int | None:
        try:
            # Mutable, so that Python gives the call's result, which is the id.
            return int(fcntl.ioctl(self._kernel, wire.BACKING_OPEN, bytearray(wire.BACKING_MAP.pack(fd, 0, 0))))
        except OSError as e:
            # ELOOP: the file lies on a stacked filesystem. It is served by the READ path instead.
            if not self.fallbacks[e.errno or 0]:
                log.warning("the kernel will not read some files by itself: %s", e.strerror)
            self.fallbacks[e.errno or 0] += 1
            return None

    def _close_backing(self, entry: OpenInode) -> None:
        if entry.backing_id is not None:
            self._close_backing_id(entry.backing_id)

    def _close_backing_id(self, number: int) -> None:
        with contextlib.suppress(OSError):  # unmounted: the kernel has closed it itself
            fcntl.ioctl(self._kernel, wire.BACKING_CLOSE, struct.pack("<I", number))

    def _reply_error(self, unique: int, number: int) -> None:
        self._write([wire.OUT_HEADER.pack(wire.OUT_HEADER_BYTES, -number, unique)])

    def _write(self, parts: list[bytes | memoryview]) -> bool:
        """Give one message to the kernel, from any thread; False when it no longer waits for it."""
        try:
            os.writev(self._kernel, parts)
        except OSError as e:
            self._refused(e)
            return False
        return True

    def _refused(self, error: OSError) -> None:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # these say that nobody waits for it any more
            log.warning("the kernel refused a reply: %s", error)

    # Deadlines

    async def _watch_deadlines(self) -> None:
        while True:
            self._ledger.beat()
            await trio.sleep(_TICK_S)
            now = trio.current_time()
            for unique, pending in list(self._pending.items()):
                if pending.expires < now and self._settle(unique):
                    self._give_back(pending)
                    self.expired += 1
                    if pending.opcode == Opcode.OPEN:
                        self._handles.discard(pending.nodeid, _handle_of(unique))
                    self._reply_error(unique, errno.EIO)
                    log.warning("request %d of inode %#x had no answer in time", pending.opcode, pending.nodeid)


def _flags2(init: bytes | memoryview) -> int:
    """The upper half of the flags that the kernel offers in INIT; 0 where it has none."""
    if len(init) < wire.INIT_IN_FLAGS2_AT + 4:
        return 0
    flags, flags2 = struct.unpack_from("<II", init, wire.INIT_IN_FLAGS_AT)
    return int(flags2) if flags & wire.FUSE_INIT_EXT else 0


def _handle_of(unique: int) -> int:
    """An OPEN's handle: its number, whether it came again or not."""
    return unique & ~wire.UNIQUE_RESEND


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
