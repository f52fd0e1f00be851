"""Processes that open chunks give what the packs give, and whatever befalls them nobody is left waiting."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.chunks.openers import SLOT_BYTES, Openers
from checkpoint.chunks.packs import Packs
from checkpoint.errors import CorruptError

CHUNKS = {f"{number}".encode(): random.Random(number).randbytes(100 + number * 50) * 40 for number in range(60)}
LARGE = bytes(range(256)) * (SLOT_BYTES // 256)


@pytest.fixture
def packs(tmp_path: Path) -> Iterator[tuple[Packs, dict[bytes, bytes]]]:
    """Packs, and what is in them by id; two of the chunks have no room in a slot together."""
    packs = Packs(f"{tmp_path}/chunks", None)
    ids: dict[bytes, bytes] = {}
    with packs.begin(threads=1) as writer:
        for content in [*CHUNKS.values(), LARGE, LARGE[::-1]]:
            ids[writer.add(memoryview(content))] = content
        writer.commit()
    yield packs, ids
    packs.close()


@contextlib.contextmanager
def begun(packs: Packs, count: int) -> Iterator[Openers]:
    openers = Openers(packs, count=count)
    openers.begin()
    try:
        yield openers
    finally:
        openers.close()


def children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def test_threads_get_what_the_packs_have(packs: tuple[Packs, dict[bytes, bytes]]) -> None:
    store, ids = packs
    wrong: list[bytes] = []

    def ask(openers: Openers, seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(20):
            wanted = generator.choices(list(ids), k=generator.randrange(1, 40))
            with openers.opened(wanted) as contents:
                wrong.extend(id_ for id_, one in zip(wanted, contents, strict=True) if bytes(one) != ids[id_])

    with begun(store, 3) as openers:
        threads = [threading.Thread(target=ask, args=(openers, seed)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert not children()


def test_one_behind_the_other_where_a_process_opened_them(packs: tuple[Packs, dict[bytes, bytes]]) -> None:
    store, ids = packs
    wanted = list(ids)[:5]
    with begun(store, 1) as openers, openers.opened(wanted) as contents:
        assert all(isinstance(one, memoryview) for one in contents)
        assert [bytes(one) for one in contents] == [ids[id_] for id_ in wanted]


def test_what_has_no_room_is_opened_here(packs: tuple[Packs, dict[bytes, bytes]]) -> None:
    store, ids = packs
    wanted = list(ids)[-3:]
    with begun(store, 1) as openers:
        for _ in range(2):
            with openers.opened(wanted) as contents:
                assert [bytes(one) for one in contents] == [ids[id_] for id_ in wanted]


def test_what_is_missing_is_an_error_here(packs: tuple[Packs, dict[bytes, bytes]]) -> None:
    store, ids = packs
    with begun(store, 1) as openers:
        with pytest.raises(CorruptError, match="missing"), openers.opened([bytes(32)]):
            pass
        with openers.opened(list(ids)[:1]) as contents:
            assert bytes(contents[0]) == ids[next(iter(ids))]


def test_killed_ones_are_missed_by_nobody(packs: tuple[Packs, dict[bytes, bytes]]) -> None:
    store, ids = packs
    with begun(store, 1) as openers:
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        for _ in range(3):
            with openers.opened(list(ids)[:4]) as contents:
                assert [bytes(one) for one in contents] == list(ids.values())[:4]
    assert not children()


def test_one_that_does_not_answer_is_asked_no_more(
    packs: tuple[Packs, dict[bytes, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpoint.chunks.openers._ANSWER_S", 0.2)
    store, ids = packs
    with begun(store, 1) as openers:
        (pid,) = children()
        os.kill(pid, signal.SIGSTOP)
        for _ in range(3):
            with openers.opened(list(ids)[:4]) as contents:
                assert [bytes(one) for one in contents] == list(ids.values())[:4]
    assert not children()


def test_they_end_with_whoever_began_them(packs: tuple[Packs, dict[bytes, bytes]]) -> None:
    store, _ = packs
    outlet, inlet = os.pipe()  # which every opener has, so that its end is seen when the last one has ended
    pid = os.fork()
    if not pid:
        openers = Openers(store, count=3)
        openers.begin()
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(inlet)
    os.waitpid(pid, 0)
    with open(outlet, "rb") as file:
        assert file.read() == b""
