"""Notifications as they are written, their order, and threads that hang in the kernel. The kernel is a pipe here."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.helpers.mounting import wait_until
from weightfs import notifier, wire
from weightfs.notifier import Notifier

FOLDER, FILE = 100, 200


class Kernel:
    """Stands in for /dev/fuse: keeps what is written, and may fail or hang for a message."""

    def __init__(self) -> None:
        self.written: list[tuple[object, ...]] = []
        self.answer: Callable[[tuple[object, ...]], None] = lambda _: None

    def write(self, fd: int, message: bytes) -> int:
        length, code, unique = wire.OUT_HEADER.unpack_from(message)
        assert (length, unique) == (len(message), 0)
        body = message[wire.OUT_HEADER_BYTES :]
        if code == wire.NOTIFY_INVAL_INODE:
            inode, offset, nbytes = wire.INVAL_INODE_OUT.unpack(body)
            assert nbytes == 0
            found: tuple[object, ...] = ("inode", inode, offset)
        elif code == wire.NOTIFY_INVAL_ENTRY:
            folder, size, flags = wire.INVAL_ENTRY_OUT.unpack_from(body)
            name = body[wire.INVAL_ENTRY_OUT.size :]
            assert name[-1:] == b"\0"
            assert size == len(name) - 1
            found = ("entry", folder, name[:-1], flags)
        else:
            assert (code, body) == (wire.NOTIFY_INC_EPOCH, b"")
            found = ("epoch",)
        self.answer(found)
        self.written.append(found)
        return len(message)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()

    class Os:
        write = staticmethod(made.write)
        strerror = staticmethod(os.strerror)

    monkeypatch.setattr(notifier, "os", Os)
    return made


@pytest.fixture
def held() -> dict[int, float]:
    return {}


@pytest.fixture
def notices(kernel: Kernel, held: dict[int, float]) -> Iterator[Notifier]:
    made = Notifier(3, lambda folder: held.get(folder, 0.0))
    yield made
    made.close()


def idle(notices: Notifier) -> None:
    wait_until(lambda: notices.waiting == 0, "all told")


def test_names_before_attributes_before_the_listing(kernel: Kernel, notices: Notifier) -> None:
    notices.folder_changed(FOLDER, gone=[b"gone"], doubtful=[b"maybe"], inodes=[FILE])
    idle(notices)
    assert kernel.written == [
        ("entry", FOLDER, b"maybe", wire.FUSE_EXPIRE_ONLY),
        ("entry", FOLDER, b"gone", 0),
        ("inode", FILE, -1),
        ("inode", FOLDER, 0),
    ]
    assert notices.sent == {"ok": 4}


def test_files_content_and_attributes(kernel: Kernel, notices: Notifier) -> None:
    notices.files_changed(FOLDER, [(b"a", FILE)])
    idle(notices)
    notices.content_changed(FILE)
    idle(notices)
    notices.attributes_changed(FILE)
    idle(notices)
    assert kernel.written == [
        ("entry", FOLDER, b"a", wire.FUSE_EXPIRE_ONLY),
        ("inode", FILE, -1),
        ("inode", FILE, 0),
        ("inode", FILE, -1),
    ]


def test_what_the_kernel_does_not_know_is_no_error(kernel: Kernel, notices: Notifier) -> None:
    def unknown(_: object) -> None:
        raise OSError(errno.ENOENT, "unknown")

    kernel.answer = unknown
    notices.attributes_changed(FILE)
    idle(notices)

    def odd(_: object) -> None:
        raise OSError(errno.EINVAL, "odd")

    kernel.answer = odd
    assert not notices.forget_all_names()
    assert notices.sent == {"unknown": 1, "EINVAL": 1}


def test_a_folder_that_hangs_holds_up_itself_only(kernel: Kernel, notices: Notifier) -> None:
    """What comes for it meanwhile is merged, and told in order once it goes on."""
    go, hangs = threading.Event(), threading.Event()

    def answer(message: tuple[object, ...]) -> None:
        if message[:2] == ("entry", FOLDER) and not go.is_set():
            hangs.set()
            go.wait(10)

    kernel.answer = answer
    notices.folder_changed(FOLDER, gone=[b"first"])
    assert hangs.wait(5)
    for number in range(50):
        notices.folder_changed(FOLDER, doubtful=[b"again"], gone=[b"x"] if number == 7 else ())
        notices.folder_changed(1000 + number, gone=[b"elsewhere"])
    wait_until(lambda: len(kernel.written) == 100, "the others")
    assert all(FOLDER not in message for message in kernel.written)
    go.set()
    idle(notices)
    assert kernel.written[100:] == [
        ("entry", FOLDER, b"first", 0),
        ("inode", FOLDER, 0),
        ("entry", FOLDER, b"again", wire.FUSE_EXPIRE_ONLY),
        ("entry", FOLDER, b"x", 0),
        ("inode", FOLDER, 0),
    ]


def test_gone_is_not_weakened_by_doubt(kernel: Kernel, notices: Notifier, held: dict[int, float]) -> None:
    held[FOLDER] = 5.0
    notices.folder_changed(FOLDER, gone=[b"a"])
    notices.folder_changed(FOLDER, doubtful=[b"a"])
    held.clear()
    idle(notices)
    assert ("entry", FOLDER, b"a", 0) in kernel.written


def test_a_folder_whose_request_waits_is_passed_over(kernel: Kernel, notices: Notifier, held: dict[int, float]) -> None:
    """Attributes go at once, since they need no lock; names when the request was answered."""
    held[FOLDER] = 5.0
    notices.files_changed(FOLDER, [(b"a", FILE)])
    wait_until(lambda: ("inode", FILE, -1) in kernel.written, "attributes")
    assert not [message for message in kernel.written if message[0] == "entry"]
    assert notices.waiting == 1
    held.clear()
    idle(notices)
    assert kernel.written[-2:] == [("entry", FOLDER, b"a", wire.FUSE_EXPIRE_ONLY), ("inode", FILE, -1)]


def test_closing_while_one_hangs(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifier, "_END_S", 0.05)
    go, hangs = threading.Event(), threading.Event()

    def answer(_: object) -> None:
        hangs.set()
        go.wait(10)

    kernel.answer = answer
    notices = Notifier(3)
    notices.content_changed(FILE)
    assert hangs.wait(5)
    assert not notices.close()
    notices.content_changed(FILE)  # too late for it
    go.set()
    assert notices.close()
    assert len(kernel.written) == 1


def test_a_sweep(kernel: Kernel, notices: Notifier, held: dict[int, float]) -> None:
    notices.sweep([(FOLDER, b"a", FILE), (FOLDER, b"b", FILE + 1)])
    assert kernel.written == [
        ("entry", FOLDER, b"a", wire.FUSE_EXPIRE_ONLY),
        ("inode", FILE, -1),
        ("entry", FOLDER, b"b", wire.FUSE_EXPIRE_ONLY),
        ("inode", FILE + 1, -1),
    ]
    assert notices.forget_all_names()
    held[FOLDER] = 5.0
    threading.Timer(0.1, notices.close).start()
    notices.sweep([(FOLDER, b"a", FILE)])  # ends with the notifier
    assert len(kernel.written) == 5
