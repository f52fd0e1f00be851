"""Memory that can't be filled in: the restore fails, says why, and nothing half filled runs on."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint import processes
from checkpoint.criu import restore
from checkpoint.errors import CheckpointError, CorruptError, RetryError
from checkpoint.filling import Buffer, Filling
from checkpoint.page_plan import Run
from checkpoint.pages import PageImage
from checkpoint.pageserver import PageServer
from tests.helpers.mounting import wait_until
from tests.helpers.paged import Dumped, dumped, needs_userfaultfd, served
from tests.helpers.targets import end, needs_criu, target, the_criu

pytestmark = [needs_criu, needs_userfaultfd]

SLEEPS = """
ballast = bytearray(os.urandom(1 << 20)) * 48
while True:
    tell(len(ballast))
    wait()
"""


class Held:
    """Copying ahead, but not the serving of faults, which waits to be let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        fill = Filling.fill

        def held(filling: Filling, piece: Run, buffer: Buffer, stopping: threading.Event) -> None:
            self.begun.set()
            assert self.go_on.wait(30)
            fill(filling, piece, buffer, stopping)

        monkeypatch.setattr(Filling, "fill", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    one = Held(monkeypatch)
    try:
        yield one
    finally:
        one.go_on.set()


@contextmanager
def half_filled(tmp_path: Path, held: Held) -> Iterator[tuple[int, str, PageServer]]:
    """A process restored, stopped, whose memory is not there yet: its pid, its images, and its server."""
    with target(SLEEPS, tmp_path) as one:
        one.said()
        gone = dumped(one, tmp_path)
        with served(gone) as server:
            options = replace(gone.options, leave_stopped=True)
            restore(the_criu(), gone.images, options, 60, work=gone.work, check=server.check)
            assert held.begun.wait(10)
            yield one.pid, gone.images, server
            held.go_on.set()
            for pid, _ in processes.family(one.pid):
                end(pid)


def test_a_process_is_killed_while_its_memory_is_filled_in(tmp_path: Path, held: Held) -> None:
    with half_filled(tmp_path, held) as (pid, _, server):
        end(pid)
        held.go_on.set()
        with pytest.raises(CheckpointError, match=rf"process {pid} has ended"):
            server.finish(10)


def test_it_takes_too_long(tmp_path: Path, held: Held) -> None:
    with half_filled(tmp_path, held) as (_, _, server), pytest.raises(RetryError, match=r"within 0.1 s"):
        server.finish(0.1)


def test_an_image_is_cut_short_meanwhile(tmp_path: Path, held: Held) -> None:
    with half_filled(tmp_path, held) as (_, images, server):
        (pages,) = Path(images).glob("pages-*.img")
        os.truncate(pages, 1 << 20)
        held.go_on.set()
        with pytest.raises(CorruptError, match="cut short") as refused:
            server.finish(10)
        assert refused.value.path == str(pages)
        with pytest.raises(CorruptError):
            server.check()


def test_a_page_is_not_mapped(tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing tells of a change, memory that can't be filled in is an error and no end of it."""
    monkeypatch.setattr("checkpoint.filling._UNMAPPED_S", 0.05)
    with half_filled(tmp_path, held) as (pid, _, server):
        with contextlib.ExitStack() as undo:
            filling = server._fillings[0]
            undo.callback(held.go_on.set)
            filling._plan = type(filling._plan)([Run(0x1000, 0x2000, 0)])
            server._put(filling, [Run(0x1000, 0x2000, 0)])
        with pytest.raises(CheckpointError, match=rf"memory of process {pid} at 0x1000"):
            server.finish(10)


def restore_and_finish(gone: Dumped, server: PageServer) -> None:
    """As a caller that does not have it stopped: it would run with what is there."""
    pid = restore(the_criu(), gone.images, gone.options, 60, work=gone.work, check=server.check)
    try:
        server.finish(10)
    except CheckpointError:
        end(pid)
        raise


def test_criu_is_ended_when_a_fault_can_not_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with target(SLEEPS, tmp_path) as one:
        one.said()
        gone = dumped(one, tmp_path)
        (image,) = Path(gone.images).glob("pages-*.img")

        def unreadable(self: Buffer, pages: PageImage, offset: int, nbytes: int) -> None:
            raise CorruptError("can't be read: Input/output error", path=pages.path)

        monkeypatch.setattr(Buffer, "read", unreadable)
        with served(gone) as server, pytest.raises(CorruptError, match="Input/output error") as refused:
            restore_and_finish(gone, server)
        assert refused.value.path == str(image)
        wait_until(lambda: not one.lives() or processes.process(one.pid).has_ended, "nothing half filled is left")


def test_criu_fails(tmp_path: Path) -> None:
    with target(SLEEPS, tmp_path) as one:
        one.said()
        gone = dumped(one, tmp_path)
        os.rename(f"{gone.images}/fs-{one.pid}.img", f"{gone.images}/away")
        with served(gone) as server:
            with pytest.raises(CheckpointError):
                restore(the_criu(), gone.images, gone.options, 60, work=gone.work, check=server.check)
            os.rename(f"{gone.images}/away", f"{gone.images}/fs-{one.pid}.img")
            pid = restore(the_criu(), gone.images, gone.options, 60, work=gone.work, check=server.check)
            assert server.finish(30).bytes_copied > 48 << 20
        assert one.ask() == str(48 << 20)
        assert pid == one.pid


def test_nobody_comes(tmp_path: Path) -> None:
    with target(SLEEPS, tmp_path) as one:
        one.said()
        with served(dumped(one, tmp_path)) as server, pytest.raises(RetryError):
            server.finish(0.01)


def test_damaged_images(tmp_path: Path) -> None:
    with target(SLEEPS, tmp_path) as one:
        one.said()
        gone = dumped(one, tmp_path)
        (pagemap,) = Path(gone.images).glob("pagemap-*.img")
        content = bytearray(pagemap.read_bytes())
        content[-1] ^= 0xFF
        pagemap.write_bytes(content)
        with pytest.raises(CorruptError) as refused:
            PageServer(gone.images, gone.work)
        assert refused.value.path is not None
