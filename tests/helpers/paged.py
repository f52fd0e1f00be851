"""Processes that are dumped, and come back with their memory filled in by the page server."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from checkpoint import userfaultfd
from checkpoint.criu import dump, options_for, restore, restore_options_of
from checkpoint.criu_command import RestoreOptions
from checkpoint.pageserver import SOCKET, Filled, PageServer
from checkpoint.processes import tree_of
from tests.helpers.targets import Target, the_criu

needs_userfaultfd = pytest.mark.skipif(
    userfaultfd.reason_against() is not None, reason=f"this machine lacks userfaultfd: {userfaultfd.reason_against()}"
)


@dataclass(frozen=True)
class Dumped:
    """A process that is gone, and its images."""

    images: str
    work: str
    options: RestoreOptions


def dumped(one: Target, tmp_path: Path) -> Dumped:
    images, work = tmp_path / "images", tmp_path / "work"
    images.mkdir(mode=0o700)
    work.mkdir(mode=0o700)
    options = options_for(tree_of(one.pid))
    dump(the_criu(), one.pid, str(images), options, 60)
    assert one.process.wait(30) == -signal.SIGKILL
    return Dumped(str(images), str(work), replace(restore_options_of(options), lazy_pages=True))


@contextmanager
def served(dump_of: Dumped, threads: int | None = None) -> Iterator[PageServer]:
    with PageServer(dump_of.images, dump_of.work, threads=threads) as server:
        yield server
    assert not os.path.exists(f"{dump_of.work}/{SOCKET}")


def back(dump_of: Dumped, *, stopped: bool = True, threads: int | None = None) -> Filled:
    with served(dump_of, threads) as server:
        options = replace(dump_of.options, leave_stopped=stopped)
        restore(the_criu(), dump_of.images, options, 60, work=dump_of.work)
        return server.finish(60)
