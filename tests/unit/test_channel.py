"""What the channel carries between kernel and pyfuse3, and what it changes; a fake of each on its sides."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.unit.fake_kernel import INIT_IN, request, stage
from weightfs import channel as module
from weightfs import reads, wire
from weightfs.wire import Opcode

INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")


def init_reply(flags: int = 0x8, flags2: int = 0x1000, background: int = 12) -> bytes:
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
            assert flags == 0x8 | wire.FUSE_INIT_EXT | wire.FUSE_MAX_PAGES | wire.FUSE_PARALLEL_DIROPS
            negotiated = wire.FUSE2_HAS_RESEND | wire.FUSE2_ALLOW_IDMAP
            negotiated |= wire.FUSE2_PASSTHROUGH if passthrough else 0
            assert flags2 == 0x1000 | (negotiated if offered else 0)
            assert depth == (passthrough and offered)
            assert (background, congestion) == (64, 48)
            assert write == 4096
            assert pages * 4096 == reads.READ_BYTES

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
            with trio.fail_after(20):
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


def test_requests_wait_for_a_pyfuse3_that_does_not_read() -> None:
    async def main() -> None:
        async with stage() as on:
            on.channel._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            sent = [await on.kernel.ask(Opcode.FORGET, 0, unique, bytes(1500)) for unique in range(40)]
            await trio.testing.wait_all_tasks_blocked(0.005)
            for message in sent:
                assert await on.pyfuse3.receive() == message

    run(main)


def test_a_pyfuse3_that_is_gone_takes_nothing_with_it() -> None:
    async def main() -> None:
        async with stage() as on:
            on.pyfuse3.socket.shutdown(socket.SHUT_WR)
            await on.kernel.ask(Opcode.FLUSH, 7, 5, bytes(24))
            assert (await on.kernel.reply()).error == errno.ENOSYS

    run(main)


def test_an_unprivileged_pair_is_as_large_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    setsockopt = socket.socket.setsockopt

    def unprivileged(self: socket.socket, level: int, option: int, value: int) -> None:
        if option in (module._SO_SNDBUFFORCE, module._SO_RCVBUFFORCE):
            raise PermissionError(errno.EPERM, "not root")
        setsockopt(self, level, option, value)

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "setsockopt", unprivileged)
            async with stage() as on:
                limit = on.channel._ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
                assert on.channel._outstanding._room_bytes == limit // 2
                assert limit // 2 > module._REPLY_BYTES + module._SMALL_REPLY_BYTES, "one listing must fit"

    run(main)


def test_an_unexpected_refusal_of_the_kernel_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with stage() as on:

            def refused(*_: object) -> int:
                raise OSError(errno.EINVAL, "malformed")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "writev", refused)
                await on.kernel.ask(Opcode.FLUSH, 7, 5, bytes(24))
                with trio.fail_after(20):
                    while not caplog.records:
                        await trio.lowlevel.checkpoint()

    run(main)
    assert "refused a reply" in caplog.text
