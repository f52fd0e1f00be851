"""Deadlines, and the room for replies; the channel's neighbours are fakes."""

from __future__ import annotations

import errno
import os
import struct
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.unit.fake_kernel import Bytes, Stage, stage
from tests.unit.test_channel import run
from tests.unit.test_channel_reads import DATA, read
from weightfs import channel as module
from weightfs import wire
from weightfs.errors import StaleError
from weightfs.handles import Place
from weightfs.wire import Opcode

# Deadlines


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(module, "_TICK_S", 0.03)
    return 0.3


def test_a_request_not_answered_in_time_is_eio_once(short: float) -> None:
    async def main() -> None:
        async with stage(deadline_s=short) as on:
            await on.kernel.ask(Opcode.LOOKUP, 7, 1, b"slow\0")
            await on.pyfuse3.request()
            reply = await on.kernel.reply()
            assert (reply.unique, reply.error) == (7, errno.EIO)
            on.pyfuse3.reply(7, b"too late")
            assert await on.kernel.silent()
            assert on.channel.expired == 1
            await on.kernel.ask(Opcode.LOOKUP, 8, 1, b"fast\0")
            await on.pyfuse3.request()
            on.pyfuse3.reply(8, b"in time")
            assert (await on.kernel.reply()).body == b"in time"

    run(main)


def test_an_open_not_answered_in_time_has_no_handle(short: float) -> None:
    async def main() -> None:
        async with stage(deadline_s=short) as on:
            await on.kernel.ask(Opcode.OPEN, 77, 5, bytes(8))
            await on.pyfuse3.request()
            assert (await on.kernel.reply()).error == errno.EIO
            assert on.handles.get(5) is None
            assert not on.handles.attach(5, lambda: (Bytes(b""), None))
            on.pyfuse3.reply(77, wire.OPEN_OUT.pack(0, 0, 0))
            assert await on.kernel.silent()

    run(main)


@pytest.mark.parametrize("fails", [None, StaleError("late")], ids=["late-bytes", "late-error"])
def test_a_read_not_answered_in_time_is_eio_once(short: float, fails: Exception | None) -> None:
    gate, done = threading.Event(), threading.Event()

    async def main() -> None:
        async with stage(deadline_s=short, threads=1) as on:
            slow = Bytes(DATA, fails, waits=lambda: gate.wait(10))
            await on.open(5, 77, slow)
            assert (await read(on, 100, 0, 20)).error == errno.EIO
            await on.open(6, 78, Bytes(DATA, waits=done.set))
            gate.set()
            assert (await read(on, 101, 5, 20, 6, 78)).body == DATA[5:25]
            assert done.is_set()
            assert on.channel.bytes_read == 20
            assert await on.kernel.silent()

    run(main)


def test_a_spliced_read_past_its_deadline_is_dropped(short: float, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    gate = threading.Event()

    async def main() -> None:
        with open(tmp_path / "file", "rb") as file:
            async with stage(deadline_s=short, threads=1) as on:
                place = Place(file.fileno(), 0, 4096)
                slow = Bytes(DATA, place=place)
                slow.in_page_cache = lambda offset, nbytes: (gate.wait(10) and place) or None  # type: ignore[method-assign]
                await on.open(5, 77, slow)
                assert (await read(on, 100, 0, 4096)).error == errno.EIO
                gate.set()
                slow.place = place
                assert (await read(on, 101, 0, 4096)).body == DATA[:4096]
                assert on.channel.bytes_read == 4096

    run(main)


def test_a_reopen_not_answered_in_time(short: float) -> None:
    async def main() -> None:
        async with stage(deadline_s=short) as on:
            gate = trio.Event()

            async def slow(_: int) -> None:
                await gate.wait()

            on.channel._reads._reopen = slow
            assert (await read(on, 100, 0, 20)).error == errno.EIO
            gate.set()
            assert await on.kernel.silent()

    run(main)


# Room for replies


def flood(on: Stage, opcode: int, count: int, body: bytes) -> trio.CancelScope:
    """Ask so much, from a task of its own; the kernel's requests wait where the channel does not take them."""
    scope = trio.CancelScope()
    sent.clear()

    async def ask() -> None:
        with scope:
            for unique in range(1000, 1000 + count):
                await on.kernel.ask(opcode, unique, 5, body)
                sent.append(unique)

    trio.lowlevel.spawn_system_task(ask)
    return scope


sent: list[int] = []

FLOODS = {
    "listings": (Opcode.READDIRPLUS, 600, wire.READ_IN.pack(0, 0, 1 << 20) + bytes(20), module._REPLY_BYTES),
    "attributes": (Opcode.GETXATTR, 300, struct.pack("<II", 65536, 0) + b"user.x\0", 65536 + 16),
    "look-ups": (Opcode.LOOKUP, 3000, b"name\0", 144),
    "symlinks": (Opcode.READLINK, 3000, b"", 4096 + 16),
}


@pytest.mark.parametrize(("opcode", "count", "body", "reply_bytes"), FLOODS.values(), ids=FLOODS.keys())
def test_replies_never_find_the_socket_full(opcode: int, count: int, body: bytes, reply_bytes: int) -> None:
    """libfuse drops a reply that gets EAGAIN. pyfuse3 here answers only once it has all that the channel lets through,
    and the channel reads nothing meanwhile: replies are sent from outside its thread's turns."""

    async def main() -> None:
        async with stage() as on:
            scope, answered = flood(on, opcode, count, body), 0
            kernel_said: list[int] = []
            while answered < count:
                batch = []  # type: ignore[var-annotated]
                await trio.testing.wait_all_tasks_blocked(0.003)
                while True:
                    try:
                        message = on.pyfuse3.socket.recv(1 << 17)
                    except BlockingIOError:
                        if on.channel._outstanding._room.is_set() or not batch:
                            await trio.lowlevel.checkpoint()
                        before = len(batch)
                        await trio.testing.wait_all_tasks_blocked(0.003)
                        try:
                            message = on.pyfuse3.socket.recv(1 << 17)
                        except BlockingIOError:
                            assert len(batch) == before
                            break
                    batch.append(wire.IN_HEADER.unpack_from(message)[2])
                assert batch, "the channel is stuck"
                for unique in batch:  # no checkpoint in between: nobody empties the socket
                    on.pyfuse3.reply(unique, bytes(reply_bytes - wire.OUT_HEADER_BYTES))
                answered += len(batch)
                for _ in batch:
                    kernel_said.append((await on.kernel.reply()).unique)
            assert sorted(kernel_said) == list(range(1000, 1000 + count))
            scope.cancel()

    run(main)


def test_a_pyfuse3_that_never_answers_costs_deadlines_and_no_more(short: float) -> None:
    async def main() -> None:
        async with stage(deadline_s=short) as on:
            count = 2000
            scope = flood(on, Opcode.LOOKUP, count, b"name\0")
            errors = [(await on.kernel.reply()) for _ in range(count)]
            assert {reply.error for reply in errors} == {errno.EIO}
            assert len({reply.unique for reply in errors}) == count
            assert on.channel.expired == count
            assert not on.channel._outstanding
            scope.cancel()

    run(main)


def test_reads_are_answered_while_no_reply_has_room() -> None:
    """A full reserve stops what pyfuse3 must answer; READs pass it by once they are taken."""

    async def main() -> None:
        async with stage() as on:
            await on.open(5, 77, Bytes(DATA))
            before = on.channel._outstanding._room_bytes
            for unique in range(200, 210):
                await on.kernel.ask(Opcode.LOOKUP, unique, 1, b"x\0")
                await on.read(unique + 1000, 5, 77, 0, 10)
            replies = [await on.kernel.reply() for _ in range(10)]
            assert {reply.unique for reply in replies} == set(range(1200, 1210))
            for _ in range(10):
                on.pyfuse3.reply((await on.pyfuse3.request())[1])
                await on.kernel.reply()
            assert on.channel._outstanding._room_bytes == before

    run(main)


def test_a_reply_the_kernel_does_not_want_any_more_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with stage() as on:
            await on.kernel.ask(Opcode.OPEN, 77, 5, bytes(8))
            await on.pyfuse3.request()
            content = Bytes(b"x")
            on.handles.attach(5, lambda: (content, None))
            writev = os.writev

            def refused(fd: int, parts: list[bytes]) -> int:
                raise OSError(errno.ENOENT, "interrupted")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "writev", refused)
                on.pyfuse3.reply(77, wire.OPEN_OUT.pack(0, 0, 0))
                with trio.fail_after(20):
                    while on.handles.get(5) is not None:
                        await trio.lowlevel.checkpoint()
            assert os.writev is writev
            assert content.closed == 1, "nobody is left to release it"

    run(main)
    assert not caplog.records
