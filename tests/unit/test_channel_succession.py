"""A channel that takes over from another, and one that hands over."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio
import trio.testing

from tests.unit.fake_kernel import INIT_IN, Bytes, Stage, request, stage
from weightfs import channel as module
from weightfs import ledger, suspects, wire
from weightfs.errors import UnfitError
from weightfs.ledger import Ledger
from weightfs.wire import Opcode

AGAIN = wire.UNIQUE_RESEND
REPLY_BODY = struct.pack("<IIIIHHIIHHI", 7, 31, 131072, 0x8, 12, 9, 4096, 1, 0, 0, 0x100) + bytes(28)


@pytest.fixture
def book() -> Iterator[Ledger]:
    """The ledger of a mount whose first daemon was given INIT, answered it, and died."""
    fd = ledger.create()
    yield ledger_after_death(fd)
    os.close(fd)


def ledger_after_death(fd: int) -> Ledger:
    async def main() -> None:
        first = Ledger(fd)
        first.begin()
        async with stage(book=first) as on:
            await on.kernel.ask(Opcode.INIT, 1, 0, INIT_IN)
            await on.pyfuse3.request()
            on.pyfuse3.reply(1, REPLY_BODY)
            await on.kernel.reply()

    trio.run(main)
    book = Ledger(fd)
    book.begin()
    return book


def succeed(book: Ledger, play: Callable[[Stage], Awaitable[None]], body: bytes = REPLY_BODY) -> None:
    """Start a successor, whose pyfuse3 answers INIT as before, and go on with `play`."""

    async def main() -> None:
        async with stage(book=book) as on:
            opcode, unique, _, sent = await on.pyfuse3.request()
            assert (opcode, unique, sent) == (Opcode.INIT, 1, INIT_IN), "the very request its predecessor had"
            on.pyfuse3.reply(1, body)
            assert await on.kernel.receive() == wire.NOTIFY_RESEND, "and not the reply to INIT, which the kernel has"
            await play(on)

    trio.run(main)


def test_a_successor_asks_for_what_was_not_answered(book: Ledger) -> None:
    async def play(on: Stage) -> None:
        await on.kernel.ask(Opcode.GETATTR, AGAIN | 50, 7, bytes(16))
        _, unique, _, _ = await on.pyfuse3.request()
        on.pyfuse3.reply(unique, b"attributes")
        reply = await on.kernel.reply()
        assert (reply.unique, reply.error) == (AGAIN | 50, 0), "the kernel looks for it with this bit"

    succeed(book, play)


def test_init_that_was_not_answered_for_certain_is_answered_again(book: Ledger) -> None:
    book._words[ledger._ANSWERED_AT] = 0

    async def main() -> None:
        async with stage(book=book) as on:
            await on.pyfuse3.request()
            on.pyfuse3.reply(1, REPLY_BODY)
            assert await on.kernel.receive() == book.init_reply
            assert await on.kernel.receive() == wire.NOTIFY_RESEND

    trio.run(main)
    assert book.is_answered


def test_another_init_is_refused_before_anything_is_read(book: Ledger) -> None:
    async def main() -> None:
        async with stage(book=book) as on:
            await on.pyfuse3.request()
            await on.kernel.ask(Opcode.GETATTR, 50, 7, bytes(16))
            on.pyfuse3.reply(1, REPLY_BODY[:8] + struct.pack("<I", 9) + REPLY_BODY[12:])  # another max_readahead
            with trio.fail_after(10):
                await trio.sleep_forever()

    with pytest.raises(ExceptionGroup) as caught:
        trio.run(main)
    assert caught.group_contains(UnfitError, match="negotiate something else")


def test_an_older_kernel_is_not_asked() -> None:
    """Before 6.9 there is no RESEND, and the supervisor does not let such a mount go on after a death."""
    fd = ledger.create()
    book = Ledger(fd)
    book.init_request = request(Opcode.INIT, 1, 0, INIT_IN[:16] + struct.pack("<I", 1) + INIT_IN[20:])
    book.init_answered()

    async def main() -> None:
        async with stage(book=book) as on:
            assert not on.channel.resends
            await on.pyfuse3.request()
            on.pyfuse3.reply(1, REPLY_BODY)
            await on.kernel.receive()  # the reply to INIT, of which there was none
            assert await on.kernel.silent()

    trio.run(main)
    os.close(fd)


def test_an_open_that_comes_again_has_its_first_handle(book: Ledger) -> None:
    async def play(on: Stage) -> None:
        reply = await on.open(7, AGAIN | 50, Bytes(b"content"))
        handle, _, _ = wire.OPEN_OUT.unpack(reply.body)
        assert handle == 50
        entry = on.handles.get(7)
        assert entry is not None
        assert entry.handles == {50}
        await on.kernel.ask(Opcode.RELEASE, AGAIN | 51, 7, struct.pack("<QIIQ", 50, 0, 0, 0))
        assert (await on.kernel.reply()).unique == AGAIN | 51
        assert on.handles.get(7) is None

    succeed(book, play)


@pytest.mark.parametrize("opcode", [Opcode.GETATTR, Opcode.READ, Opcode.LOOKUP])
def test_what_two_daemons_died_of_is_answered_eio(book: Ledger, opcode: Opcode) -> None:
    body = wire.READ_IN.pack(50, 0, 4096) + bytes(20)

    gate, asked = threading.Event(), threading.Event()

    def wait() -> None:
        asked.set()
        gate.wait()

    async def first_time(on: Stage) -> None:
        on.handles.add(7, 50)
        on.handles.attach(7, lambda: (Bytes(b"", waits=wait), None))
        await on.kernel.ask(opcode, AGAIN | 60, 7, body)
        if opcode != Opcode.READ:
            await on.pyfuse3.request()
        else:
            await trio.to_thread.run_sync(asked.wait)

    async def second_time(on: Stage) -> None:
        await on.kernel.ask(opcode, AGAIN | 60, 7, body)
        reply = await on.kernel.reply()
        assert (reply.unique, reply.error) == (AGAIN | 60, errno.EIO)
        assert on.channel.poisoned == 1
        await on.kernel.ask(Opcode.GETATTR, AGAIN | 61, 7, bytes(16))
        _, unique, _, _ = await on.pyfuse3.request()
        assert unique == AGAIN | 61, "what has seen one death is tried"

    try:
        succeed(book, first_time)
        book.begin()
        succeed(book, second_time)
    finally:
        gate.set()


def test_what_only_waited_beside_it_is_tried_again(book: Ledger) -> None:
    """Two requests were in the hands of two daemons that died; the second had not been begun by the second one."""

    async def first_time(on: Stage) -> None:
        for unique in (60, 61):
            await on.kernel.ask(Opcode.GETATTR, AGAIN | unique, 7, bytes(16))
        assert (await on.pyfuse3.request())[1] == AGAIN | 60
        # Dies before the trial of 60 is over.

    async def second_time(on: Stage) -> None:
        for unique in (61, 60):
            await on.kernel.ask(Opcode.GETATTR, AGAIN | unique, 7, bytes(16))
        reply = await on.kernel.reply()
        assert (reply.unique, reply.error) == (AGAIN | 60, errno.EIO)
        assert (await on.pyfuse3.request())[1] == AGAIN | 61
        on.pyfuse3.reply(AGAIN | 61, b"attributes")
        assert (await on.kernel.reply()).unique == AGAIN | 61
        assert on.channel.poisoned == 1

    succeed(book, first_time)
    book.begin()
    succeed(book, second_time)


def test_a_slow_one_holds_up_the_others_only_for_a_while(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "_TRIAL_S", 0.01)

    async def play(on: Stage) -> None:
        for unique in (60, 61):
            await on.kernel.ask(Opcode.GETATTR, AGAIN | unique, 7, bytes(16))
        assert (await on.pyfuse3.request())[1] == AGAIN | 60
        assert (await on.pyfuse3.request())[1] == AGAIN | 61

    succeed(book, play)


def test_one_that_kills_slowly_is_found_in_the_end(book: Ledger) -> None:
    for _ in range(4):
        book.deaths_seen(60)
        book.begin()

    async def play(on: Stage) -> None:
        await on.kernel.ask(Opcode.GETATTR, AGAIN | 60, 7, bytes(16))
        assert (await on.kernel.reply()).error == errno.EIO

    succeed(book, play)


def test_who_waits_for_a_trial_is_answered_at_the_end(book: Ledger) -> None:
    async def play(on: Stage) -> None:
        for unique in (60, 61):
            await on.kernel.ask(Opcode.GETATTR, AGAIN | unique, 7, bytes(16))
        await on.pyfuse3.request()
        on.channel.abandon()
        replies = [await on.kernel.reply() for _ in range(2)]
        assert {(one.unique, one.error) for one in replies} == {(AGAIN | 60, errno.EIO), (AGAIN | 61, errno.EIO)}

    succeed(book, play)


def test_release_is_never_poison(book: Ledger) -> None:
    book.deaths_seen(60)
    book.begin()

    async def play(on: Stage) -> None:
        await on.kernel.ask(Opcode.RELEASE, AGAIN | 60, 7, struct.pack("<QIIQ", 50, 0, 0, 0))
        assert (await on.kernel.reply()).error == 0
        assert on.channel.poisoned == 0

    succeed(book, play)


def test_a_handle_that_can_not_be_noted_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with stage() as on:
            monkeypatch.setattr(on.handles, "answer", lambda inode, handle: False)
            reply = await on.open(7, 50, Bytes(b"content"))
            assert reply.error == errno.ENFILE
            assert on.handles.get(7) is None

    trio.run(main)


@pytest.mark.parametrize("answers", [True, False])
def test_retiring_answers_what_it_can_and_reads_no_more(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DRAIN_S", 0.05)

    async def main() -> None:
        async with stage() as on:
            await on.kernel.ask(Opcode.GETATTR, 50, 7, bytes(16))
            await on.pyfuse3.request()
            on.channel.retire()
            await trio.testing.wait_all_tasks_blocked(0.001)
            await on.kernel.ask(Opcode.GETATTR, 51, 7, bytes(16))
            if answers:
                on.pyfuse3.reply(50, b"attributes")
                assert (await on.kernel.reply()).unique == 50
            await trio.sleep(0.1)
            assert await on.kernel.silent()
            assert await on.pyfuse3.silent()

    trio.run(main)


def test_backing_ids_left_behind_are_closed(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those a predecessor died with, and those it may have made and not noted."""
    closed: list[int] = []
    book.put_inode(ledger.OpenRow(7, 12, 0, 0))

    async def main() -> None:
        async with stage(book=book, passthrough=True) as on:
            monkeypatch.setattr(on.channel._kernel, "close_backing", closed.append)
            on.channel._negotiation.passthrough = True
            on.channel._resume([3])

    trio.run(main)
    assert closed == [3, *range(13, 13 + module._LOST_IDS)]
