"""What the channel carries between kernel and pyfuse3, and what it changes; a fake of each on its sides."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from tests.unit.fake_kernel import INIT_IN, Bytes, request, stage
from weightfs import channel as module
from weightfs import wire
from weightfs.wire import Opcode

INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")


def init_reply(flags: int = 0x8, flags2: int = 0x100, background: int = 12) -> bytes:
    return INIT_OUT.pack(7, 31, 131072, flags, background, 9, 131072, 1, 32, 0, flags2, 0, 0)


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(30):
            await main()

    trio.run(bounded)


def test_requests_and_replies_pass_byte_for_byte() -> None:
    async def main() -> None:
        async with stage() as on:
            for unique, opcode in enumerate(
                (Opcode.LOOKUP, Opcode.GETATTR, Opcode.READLINK, Opcode.STATFS, 99), start=2
            ):
                body = os.urandom(37)
                sent = await on.kernel.ask(opcode, unique, 5, body)
                assert await on.pyfuse3.receive() == sent
                answer = os.urandom(120)
                on.pyfuse3.reply(unique, answer)
                reply = await on.kernel.reply()
                assert (reply.error, reply.unique, reply.body) == (0, unique, answer)
                assert on.channel.requests[opcode] == 1
            await on.kernel.ask(Opcode.LOOKUP, 50, 1, b"nothing\0")
            await on.pyfuse3.request()
            on.pyfuse3.reply(50, error=errno.ENOENT)
            assert (await on.kernel.reply()).error == errno.ENOENT

    run(main)


def test_requests_under_way_at_once_are_answered_in_any_order() -> None:
    async def main() -> None:
        async with stage() as on:
            for unique in range(2, 42):
                await on.kernel.ask(Opcode.GETATTR, unique)
            seen = [(await on.pyfuse3.request())[1] for _ in range(40)]
            for unique in reversed(seen):
                on.pyfuse3.reply(unique, b"%d" % unique)
            replies = [await on.kernel.reply() for _ in range(40)]
            assert [reply.unique for reply in replies] == list(range(41, 1, -1))
            assert all(reply.body == b"%d" % reply.unique for reply in replies)

    run(main)


@pytest.mark.parametrize("passthrough", [True, False])
@pytest.mark.parametrize("offered", [True, False])
def test_init_is_negotiated(passthrough: bool, offered: bool) -> None:
    async def main() -> None:
        async with stage(passthrough=passthrough) as on:
            assert on.channel.passthrough is None
            body = INIT_IN if offered else INIT_IN[:12] + struct.pack("<II", 1, 0xFFFFFFFF) + INIT_IN[20:]
            sent = await on.kernel.ask(Opcode.INIT, 1, 0, body)
            assert await on.pyfuse3.receive() == sent
            assert on.channel.passthrough is (passthrough and offered)
            assert not on.channel.ready.is_set()  # type: ignore[unreachable]
            on.pyfuse3.reply(1, init_reply())
            reply = await on.kernel.reply()
            assert on.channel.ready.is_set()
            major, minor, readahead, flags, background, congestion, write, gran, pages, align, flags2, depth, _ = (
                INIT_OUT.unpack(reply.body)
            )
            assert (major, minor, readahead, gran, align) == (7, 31, 131072, 1, 0), "left as they were"
            assert flags == 0x8 | wire.FUSE_INIT_EXT | wire.FUSE_CACHE_SYMLINKS | wire.FUSE_MAX_PAGES
            assert flags2 == 0x100 | (wire.FUSE2_PASSTHROUGH if passthrough and offered else 0)
            assert depth == (passthrough and offered)
            assert (background, congestion) == (64, 48)
            assert write == 4096
            assert pages * 4096 == module._READ_BYTES

    run(main)


def test_a_larger_queue_than_ours_is_left() -> None:
    async def main() -> None:
        async with stage() as on:
            await on.kernel.ask(Opcode.INIT, 1, 0, INIT_IN)
            await on.pyfuse3.request()
            on.pyfuse3.reply(1, init_reply(background=200))
            assert INIT_OUT.unpack((await on.kernel.reply()).body)[4:6] == (200, 150)

    run(main)


def test_a_refused_init_is_passed_on() -> None:
    async def main() -> None:
        async with stage(passthrough=True) as on:
            await on.kernel.ask(Opcode.INIT, 1, 0, INIT_IN)
            await on.pyfuse3.request()
            on.pyfuse3.reply(1, error=errno.EPROTO)
            assert (await on.kernel.reply()).error == errno.EPROTO
            assert not on.channel.ready.is_set()

    run(main)


# Handles


def test_open_makes_its_unique_the_handle_before_pyfuse3_hears_of_it() -> None:
    async def main() -> None:
        async with stage() as on:
            await on.kernel.ask(Opcode.OPEN, 77, 5, bytes(8))
            assert (await on.pyfuse3.request())[:3] == (Opcode.OPEN, 77, 5)
            entry = on.handles.get(5)
            assert entry is not None
            assert entry.handles == {77}
            assert not entry.settled
            on.pyfuse3.reply(77, wire.OPEN_OUT.pack(0, wire.FOPEN_KEEP_CACHE, 0))
            handle, flags, backing = wire.OPEN_OUT.unpack((await on.kernel.reply()).body)
            assert (handle, backing) == (77, 0)
            assert flags == wire.FOPEN_KEEP_CACHE | wire.FOPEN_NOFLUSH
            assert entry.settled

    run(main)


def test_a_failed_open_discards_its_handle() -> None:
    async def main() -> None:
        async with stage() as on:
            await on.kernel.ask(Opcode.OPEN, 77, 5, bytes(8))
            await on.pyfuse3.request()
            on.pyfuse3.reply(77, error=errno.ESTALE)
            assert (await on.kernel.reply()).error == errno.ESTALE
            assert on.handles.get(5) is None

    run(main)


def test_a_file_the_kernel_will_not_read_by_itself_is_read_here() -> None:
    """The fake kernel knows no backing files: ENOTTY, as ELOOP for a stacked filesystem."""

    async def main() -> None:
        async with stage(passthrough=True) as on:
            await on.kernel.ask(Opcode.INIT, 1, 0, INIT_IN)
            await on.pyfuse3.request()
            on.pyfuse3.reply(1, init_reply())
            await on.kernel.reply()
            for unique in (77, 78):
                reply = await on.open(5, unique, Bytes(b"content"), fd=0)
                handle, flags, backing = wire.OPEN_OUT.unpack(reply.body)
                assert (handle, backing) == (unique, 0)
                assert flags & wire.FOPEN_KEEP_CACHE
                assert not flags & wire.FOPEN_PASSTHROUGH
            assert on.channel.fallbacks == {errno.ENOTTY: 1}, "asked once an inode"

    run(main)


def test_a_backing_file_is_opened_once_an_inode_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bytes]] = []

    def ioctl(_: int, number: int, argument: bytes) -> int:
        calls.append((number, bytes(argument)))
        return 9

    monkeypatch.setattr(module.fcntl, "ioctl", ioctl)  # type: ignore[attr-defined]

    async def main() -> None:
        async with stage(passthrough=True) as on:
            await on.kernel.ask(Opcode.INIT, 1, 0, INIT_IN)
            await on.pyfuse3.request()
            on.pyfuse3.reply(1, init_reply())
            await on.kernel.reply()
            content = Bytes(b"content")
            for unique in (77, 78):
                reply = await on.open(5, unique, content, fd=3)
                assert wire.OPEN_OUT.unpack(reply.body) == (
                    unique, wire.FOPEN_PASSTHROUGH | wire.FOPEN_NOFLUSH, 9,
                )  # fmt: skip
            assert calls == [(wire.BACKING_OPEN, wire.BACKING_MAP.pack(3, 0, 0))]
            await on.read(79, 5, 77, 0, 7)
            assert (await on.kernel.reply()).body == b"content"
            assert on.channel.hints == 1
            for unique, handle in ((80, 77), (81, 78)):
                await on.kernel.ask(Opcode.RELEASE, unique, 5, struct.pack("<QII", handle, 0, 0))
                assert (await on.kernel.reply()).error == 0
            assert calls[1:] == [(wire.BACKING_CLOSE, struct.pack("<I", 9))]
            assert content.closed == 1

    run(main)


def test_release_is_answered_here() -> None:
    async def main() -> None:
        async with stage() as on:
            content = Bytes(b"content")
            for unique in (77, 78):
                await on.open(5, unique, content)
            for unique, handle, left in ((80, 77, {78}), (81, 78, None), (82, 78, None)):
                await on.kernel.ask(Opcode.RELEASE, unique, 5, struct.pack("<QII", handle, 0, 0))
                reply = await on.kernel.reply()
                assert (reply.unique, reply.error, reply.body) == (unique, 0, b"")
                entry = on.handles.get(5)
                assert (entry.handles if entry else None) == left
            assert (content.forgotten, content.closed) == ([77, 78], 1)
            assert await on.pyfuse3.silent()

    run(main)


@pytest.mark.parametrize("opcode", [Opcode.FLUSH, Opcode.OPENDIR])
def test_what_the_kernel_need_not_ask(opcode: Opcode) -> None:
    async def main() -> None:
        async with stage() as on:
            await on.kernel.ask(opcode, 7, 5, bytes(24))
            reply = await on.kernel.reply()
            assert (reply.unique, reply.error) == (7, errno.ENOSYS)
            assert await on.pyfuse3.silent()

    run(main)


def test_interrupts_are_dropped_and_forgets_passed_on() -> None:
    async def main() -> None:
        async with stage() as on:
            await on.kernel.ask(Opcode.INTERRUPT, 8, 0, struct.pack("<Q", 7))
            sent = [
                await on.kernel.ask(Opcode.FORGET, 0, 5, struct.pack("<Q", 1)),
                await on.kernel.ask(Opcode.BATCH_FORGET, 0, 0, struct.pack("<II", 1, 0) + struct.pack("<QQ", 6, 2)),
            ]
            assert [await on.pyfuse3.receive(), await on.pyfuse3.receive()] == sent
            assert await on.kernel.silent()
            assert not on.channel._pending

    run(main)


# Listings


def test_a_listing_carries_the_inode_as_handle_and_is_cut() -> None:
    async def main() -> None:
        async with stage() as on:
            for opcode, size in ((Opcode.READDIRPLUS, 1 << 20), (Opcode.READDIR, 1 << 20), (Opcode.READDIRPLUS, 4096)):
                await on.kernel.ask(opcode, 7, 5, wire.READ_IN.pack(0, 33, size) + bytes(20))
                _, _, _, body = await on.pyfuse3.request()
                handle, cookie, wanted = wire.READ_IN.unpack_from(body)
                assert (handle, cookie, wanted) == (5, 33, min(size, module._REPLY_BYTES))
                on.pyfuse3.reply(7, b"rows")
                assert (await on.kernel.reply()).body == b"rows"

    run(main)


def test_the_end_of_a_listing_is_told_here() -> None:
    async def main() -> None:
        async with stage() as on:
            on.ends[5] = 33
            await on.kernel.ask(Opcode.READDIRPLUS, 7, 5, wire.READ_IN.pack(0, 33, 4096) + bytes(20))
            reply = await on.kernel.reply()
            assert (reply.unique, reply.error, reply.body) == (7, 0, b"")
            assert await on.pyfuse3.silent()
            for unique, nodeid, cookie in ((8, 5, 0), (9, 5, 32), (10, 6, 33)):
                await on.kernel.ask(Opcode.READDIRPLUS, unique, nodeid, wire.READ_IN.pack(0, cookie, 4096) + bytes(20))
                assert (await on.pyfuse3.request())[1] == unique

    run(main)


# Ends


def test_unmounting_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    readv, numbers = os.readv, [errno.EINTR, errno.ENOENT, errno.ENODEV]

    def failing(fd: int, buffers: list[bytearray]) -> int:
        got = readv(fd, buffers)
        raise OSError(numbers.pop(0), "as the kernel says") if got == wire.IN_HEADER_BYTES else AssertionError

    monkeypatch.setattr(os, "readv", failing)

    async def main() -> None:
        async with stage() as on:
            for unique in range(3):
                await on.kernel.ask(Opcode.DESTROY, unique)
            with trio.fail_after(5):
                while numbers:
                    await trio.lowlevel.checkpoint()
            assert on.channel.requests == {}

    run(main)


def test_another_failure_of_the_kernels_side_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EBADF, "closed under us")

    monkeypatch.setattr(os, "readv", failing)

    async def main() -> None:
        async with stage():
            await trio.sleep_forever()

    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="closed under us"), flatten_subgroups=True):
        run(main)


def test_the_mountpoint_is_what_libfuse_takes(tmp_path: Path) -> None:
    async def main() -> None:
        async with stage() as on:
            assert on.channel.mountpoint == f"/dev/fd/{on.pyfuse3.socket.fileno()}"
            assert os.path.exists(on.channel.mountpoint)
            assert len(request(Opcode.GETATTR, 1, 1, b"")) == wire.IN_HEADER_BYTES

    run(main)
