"""Both neighbours of a channel: a kernel and a pyfuse3, each the other end of a pair of sockets."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio
import trio.testing

from weightfs import ledger, wire
from weightfs.channel import Channel, ChannelConfig
from weightfs.errors import StaleError, WeightfsError
from weightfs.handles import HandleTable, Place
from weightfs.ledger import Ledger

FLAGS_IN = wire.FUSE_INIT_EXT | 0x1
OFFERED = wire.FUSE2_PASSTHROUGH | wire.FUSE2_HAS_RESEND | wire.FUSE2_ALLOW_IDMAP | 1
INIT_IN = struct.pack("<IIIII", 7, 45, 131072, FLAGS_IN, OFFERED) + bytes(44)


@dataclass(frozen=True)
class Reply:
    error: int
    unique: int
    body: bytes


def errno_of(error: BaseException) -> int:
    if isinstance(error, StaleError):
        return errno.ESTALE
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return errno.EIO if isinstance(error, WeightfsError) else errno.EPROTO


@dataclass
class Bytes:
    """A readable in memory, which may fail or wait."""

    data: bytes
    fails: Exception | None = None
    waits: Callable[[], object] = lambda: None
    place: Place | None = None
    fd: int | None = None
    promise: tuple[int, int] = (0, 0)
    forgotten: list[int] = field(default_factory=list)
    closed: int = 0

    def in_page_cache(self, offset: int, nbytes: int) -> Place | None:
        return self.place

    def read_into(self, handle: int, buffer: memoryview, offset: int) -> int:
        self.waits()
        if self.fails is not None:
            raise self.fails
        part = self.data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def forget(self, handle: int) -> None:
        self.forgotten.append(handle)

    def close(self) -> None:
        self.closed += 1


class End:
    """One end of a pair: whole messages, none waited for longer than the test."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        end.setblocking(False)

    async def receive(self) -> bytes:
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(self.socket)
        return self.socket.recv(1 << 21)

    async def silent(self) -> bool:
        """Whether nothing has come once the channel has had its turns."""
        await trio.testing.wait_all_tasks_blocked(0.005)
        try:
            self.socket.recv(1 << 21, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False


class Kernel(End):
    """Sends requests, receives replies."""

    async def ask(self, opcode: int, unique: int, nodeid: int = 1, body: bytes = b"") -> bytes:
        message = request(opcode, unique, nodeid, body)
        with trio.fail_after(10):
            while True:
                try:
                    self.socket.send(message)
                    return message
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.socket)

    async def reply(self) -> Reply:
        return parsed(await self.receive())


class Pyfuse3(End):
    """Receives requests, sends replies."""

    async def request(self) -> tuple[int, int, int, bytes]:
        message = await self.receive()
        length, opcode, unique, nodeid = wire.IN_HEADER.unpack_from(message)
        assert length == len(message)
        return opcode, unique, nodeid, message[wire.IN_HEADER_BYTES :]

    def reply(self, unique: int, body: bytes = b"", error: int = 0) -> None:
        self.socket.send(wire.OUT_HEADER.pack(wire.OUT_HEADER_BYTES + len(body), -error, unique) + body)


def request(opcode: int, unique: int, nodeid: int, body: bytes) -> bytes:
    head = wire.IN_HEADER.pack(wire.IN_HEADER_BYTES + len(body), opcode, unique, nodeid)
    return head + bytes(wire.IN_HEADER_BYTES - len(head)) + body


def parsed(message: bytes) -> Reply:
    length, error, unique = wire.OUT_HEADER.unpack_from(message)
    assert length == len(message)
    return Reply(-error, unique, message[wire.OUT_HEADER_BYTES :])


@dataclass
class Stage:
    """A channel that runs, and what stands on its sides."""

    channel: Channel
    kernel: Kernel
    pyfuse3: Pyfuse3
    handles: HandleTable
    reopened: list[int]
    reopen: Callable[[int], object]
    ends: dict[int, int]

    async def open(self, nodeid: int, unique: int, readable: Bytes | None = None, fd: int | None = None) -> Reply:
        """OPEN as FuseOperations answers it."""
        await self.kernel.ask(wire.Opcode.OPEN, unique, nodeid, struct.pack("<II", 0, 0))
        await self.pyfuse3.request()
        if readable is not None:
            self.handles.attach(nodeid, lambda: (readable, fd))
        self.pyfuse3.reply(unique, wire.OPEN_OUT.pack(0, wire.FOPEN_KEEP_CACHE, 0))
        return await self.kernel.reply()

    async def read(self, unique: int, nodeid: int, handle: int, offset: int, size: int) -> None:
        body = wire.READ_IN.pack(handle, offset, size) + bytes(20)
        await self.kernel.ask(wire.Opcode.READ, unique, nodeid, body)


@asynccontextmanager
async def stage(
    *, passthrough: bool = False, deadline_s: float = 30.0, threads: int = 2, book: Ledger | None = None
) -> AsyncIterator[Stage]:
    """Run a channel between a kernel and a pyfuse3; ends by cancelling, since a socket can't say ENODEV.

    With a `book` it is a successor's, which has the right to read at once.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (near, far):
        end.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF, 32, 33):
            try:
                end.setsockopt(socket.SOL_SOCKET, option, 8 << 20)
            except PermissionError:
                pass
    handles, reopened, ends = HandleTable(), list[int](), dict[int, int]()

    async def reopen(nodeid: int) -> None:
        reopened.append(nodeid)
        made.reopen(nodeid)

    async def at_once() -> list[int]:
        return []

    config = ChannelConfig(passthrough=passthrough, deadline_s=deadline_s, threads=threads)
    book_fd = ledger.create()
    channel = Channel(near.fileno(), handles, ends.get, reopen, errno_of, book or Ledger(book_fd), config)
    theirs_fd = channel._theirs.fileno()
    made = Stage(channel, Kernel(far), Pyfuse3(channel._theirs), handles, reopened, lambda _: None, ends)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.run, at_once)
            yield made
            nursery.cancel_scope.cancel()
    finally:
        channel.close()
        handles.close()
        os.close(theirs_fd)  # libfuse does it
        os.close(book_fd)
        for end in (near, far):
            end.close()
