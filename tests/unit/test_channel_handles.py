"""OPEN, RELEASE and what else concerns handles; the channel's neighbours are fakes."""

from __future__ import annotations

import errno
import fcntl
import struct

import pytest

from tests.unit.fake_kernel import INIT_IN, Bytes, stage
from tests.unit.test_channel import init_reply, run
from weightfs import wire
from weightfs.wire import Opcode

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

    monkeypatch.setattr(fcntl, "ioctl", ioctl)

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
            assert not on.channel._outstanding

    run(main)
