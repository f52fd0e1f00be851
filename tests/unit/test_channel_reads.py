"""READs, deadlines and the room for replies; the channel's neighbours are fakes."""

from __future__ import annotations

import errno
import os
import struct
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.unit.fake_kernel import Bytes, Reply, Stage, stage
from tests.unit.test_channel import run
from weightfs import channel as module
from weightfs import wire
from weightfs.errors import ShortReadError, StaleError
from weightfs.handles import Place
from weightfs.wire import Opcode

DATA = os.urandom(3 << 20)


async def read(on: Stage, unique: int, offset: int, size: int, nodeid: int = 5, handle: int = 77) -> Reply:
    await on.read(unique, nodeid, handle, offset, size)
    return await on.kernel.reply()


def test_reads_are_answered_from_the_readable() -> None:
    async def main() -> None:
        async with stage() as on:
            await on.open(5, 77, Bytes(DATA))
            total = 0
            ranges = [(0, 1), (4095, 8192), (1 << 20, 131072), (len(DATA) - 5, 100), (len(DATA), 100), (1 << 40, 7)]
            for unique, (offset, size) in enumerate(ranges, start=100):
                reply = await read(on, unique, offset, size)
                assert (reply.error, reply.unique) == (0, unique)
                assert reply.body == DATA[offset : offset + size]
                total += len(reply.body)
            assert on.channel.bytes_read == total
            assert on.channel.requests[Opcode.READ] == len(ranges)
            assert await on.pyfuse3.silent()
            assert not on.channel._pending

    run(main)


def test_a_read_larger_than_was_agreed_is_cut() -> None:
    async def main() -> None:
        async with stage() as on:
            await on.open(5, 77, Bytes(DATA))
            assert (await read(on, 100, 0, 1 << 30)).body == DATA[: module._READ_BYTES]

    run(main)


def test_pages_in_the_cache_go_to_the_kernel_without_a_copy(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)

    async def main() -> None:
        with open(tmp_path / "file", "rb") as file:
            async with stage() as on:
                # What read_into would give is wrong: it is not asked.
                await on.open(5, 77, Bytes(b"x" * 5000, place=Place(file.fileno(), 4096, 5000)))
                assert (await read(on, 100, 4096, 5000)).body == DATA[4096:9096]
                assert on.channel.bytes_read == 5000

    run(main)


def test_a_file_cut_under_the_pipe_is_read_with_care(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA[:6000])

    async def main() -> None:
        with open(tmp_path / "file", "rb") as file:
            async with stage() as on:
                gone = Bytes(b"", StaleError("was cut"), place=Place(file.fileno(), 4096, 5000))
                await on.open(5, 77, gone)
                reply = await read(on, 100, 4096, 5000)
                assert (reply.error, reply.body) == (errno.ESTALE, b"")
                assert (await read(on, 101, 4096, 5000)).error == errno.ESTALE

    run(main)


FAILURES = [
    (ShortReadError("short"), errno.EIO),
    (StaleError("changed"), errno.ESTALE),
    (OSError(errno.EREMOTEIO, "disk"), errno.EREMOTEIO),
    (ValueError("nobody expected it"), errno.EPROTO),
    (MemoryError(), errno.EPROTO),
]


@pytest.mark.parametrize(("error", "number"), FAILURES, ids=[type(error).__name__ for error, _ in FAILURES])
def test_a_failing_read_is_its_errno_and_the_next_goes_on(error: Exception, number: int) -> None:
    async def main() -> None:
        async with stage(threads=1) as on:
            content = Bytes(DATA, error)
            await on.open(5, 77, content)
            for unique in (100, 101):
                reply = await read(on, unique, 0, 100)
                assert (reply.error, reply.body) == (number, b"")
            content.fails = None
            assert (await read(on, 102, 0, 100)).body == DATA[:100]
            assert on.channel.bytes_read == 100

    run(main)


def test_reads_are_answered_at_once_by_as_many_threads_as_there_are() -> None:
    together = threading.Barrier(3)

    async def main() -> None:
        async with stage(threads=3) as on:
            await on.open(5, 77, Bytes(DATA, waits=lambda: together.wait(10)))
            for unique in range(100, 106):
                await on.read(unique, 5, 77, unique, 1)
            replies = [await on.kernel.reply() for _ in range(6)]
            assert {reply.unique: reply.body for reply in replies} == {n: DATA[n : n + 1] for n in range(100, 106)}

    run(main)


def test_a_stuck_read_holds_nobody_else() -> None:
    gate = threading.Event()

    async def main() -> None:
        async with stage(threads=2) as on:
            await on.open(5, 77, Bytes(b"slow", waits=lambda: gate.wait(10)))
            await on.open(6, 78, Bytes(b"fast"))
            await on.read(100, 5, 77, 0, 4)
            assert (await read(on, 101, 0, 4, 6, 78)).body == b"fast"
            await on.kernel.ask(Opcode.GETATTR, 102)
            assert (await on.pyfuse3.request())[1] == 102
            gate.set()
            assert (await on.kernel.reply()).unique == 100

    run(main)


# Handles of another process


def test_a_handle_of_a_daemon_before_us_is_reopened_once() -> None:
    async def main() -> None:
        async with stage() as on:

            def attach(nodeid: int) -> None:
                on.handles.attach(nodeid, lambda: (Bytes(DATA), None))

            on.reopen = attach
            assert (await read(on, 100, 10, 20)).body == DATA[10:30]
            assert (await read(on, 101, 30, 20)).body == DATA[30:50]
            assert on.reopened == [5]
            entry = on.handles.get(5)
            assert entry is not None
            assert entry.handles == {77}

    run(main)


def test_a_handle_that_can_not_be_reopened() -> None:
    async def main() -> None:
        async with stage() as on:

            def fail(_: int) -> None:
                raise StaleError("another content")

            on.reopen = fail
            assert (await read(on, 100, 0, 20)).error == errno.ESTALE
            on.reopen = lambda _: None  # says that it did, and attached nothing
            assert (await read(on, 101, 0, 20)).error == errno.EIO
            await on.kernel.ask(Opcode.RELEASE, 102, 5, struct.pack("<QII", 77, 0, 0))
            assert (await on.kernel.reply()).error == 0
            assert on.handles.get(5) is None

    run(main)


# Deadlines


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(module, "_TICK_S", 0.03)
    return 0.05


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

            on.channel._reopen = slow
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
                        if on.channel._room.is_set() or not batch:
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
            assert not on.channel._pending
            scope.cancel()

    run(main)


def test_reads_are_answered_while_no_reply_has_room() -> None:
    """A full reserve stops what pyfuse3 must answer; READs pass it by once they are taken."""

    async def main() -> None:
        async with stage() as on:
            await on.open(5, 77, Bytes(DATA))
            before = on.channel._reserve_bytes
            for unique in range(200, 210):
                await on.kernel.ask(Opcode.LOOKUP, unique, 1, b"x\0")
                await on.read(unique + 1000, 5, 77, 0, 10)
            replies = [await on.kernel.reply() for _ in range(10)]
            assert {reply.unique for reply in replies} == set(range(1200, 1210))
            for _ in range(10):
                on.pyfuse3.reply((await on.pyfuse3.request())[1])
                await on.kernel.reply()
            assert on.channel._reserve_bytes == before

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
                with trio.fail_after(5):
                    while on.handles.get(5) is not None:
                        await trio.lowlevel.checkpoint()
            assert os.writev is writev
            assert content.closed == 1, "nobody is left to release it"

    run(main)
    assert not caplog.records
