"""READs, deadlines and the room for replies; the channel's neighbours are fakes."""

from __future__ import annotations

import errno
import os
import struct
import threading
from pathlib import Path

import pytest

from tests.unit.fake_kernel import Bytes, Reply, Stage, stage
from tests.unit.test_channel import run
from weightfs import reads
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
            assert not on.channel._outstanding

    run(main)


def test_reads_are_noted_from_the_first_question_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "_OBSERVED", 3)

    async def main() -> None:
        async with stage() as on:
            await on.open(5, 77, Bytes(DATA))
            await read(on, 100, 0, 10)
            assert on.channel.observed_reads(10) == ([], 0)
            for unique in range(101, 106):
                await read(on, unique, unique << 12, 20)
            assert on.channel.observed_reads(2) == ([[5, 101 << 12, 20], [5, 102 << 12, 20]], 2)
            assert on.channel.observed_reads(2) == ([[5, 103 << 12, 20]], 0)
            assert on.channel.observed_reads(2) == ([], 0)

    run(main)


def test_a_read_larger_than_was_agreed_is_cut() -> None:
    async def main() -> None:
        async with stage() as on:
            await on.open(5, 77, Bytes(DATA))
            assert (await read(on, 100, 0, 1 << 30)).body == DATA[: reads.READ_BYTES]

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
