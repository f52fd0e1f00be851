"""Chunks are added, pruned, lost their indexes, got other keys, and processes died at it, in any order: what a snapshot
needs is always there.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from checkpoint.chunks import writing
from checkpoint.chunks.folder import DRAFT, INDEX, PACK
from checkpoint.chunks.keys import MasterKey
from checkpoint.chunks.packs import Packs
from checkpoint.errors import CorruptError
from tests.helpers.breaking_disk import breaking_disk

CHOOSE = random.Random(1)
CONTENTS = [
    CHOOSE.randbytes(CHOOSE.randrange(1, 9000)) if number % 3 else CHOOSE.randbytes(9) * CHOOSE.randrange(1, 4000)
    for number in range(16)
]
PACK_BYTES = 24_000
Dies = st.none() | st.integers(0, 40)


class Chunks(RuleBasedStateMachine):
    """A store against what its snapshots hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.path = os.path.join(self.folder, "packs")
        self.master: MasterKey | None = None
        self.snapshots: dict[str, dict[bytes, bytes]] = {}
        chance = random.Random(
            2
        )  # as names, and the order in which packs are finished, decide what a dead process left
        self.patches = contextlib.ExitStack()
        for patch in (
            mock.patch.object(writing, "PACK_BYTES", PACK_BYTES),
            mock.patch("os.urandom", chance.randbytes),
            mock.patch("secrets.token_bytes", chance.randbytes),
            mock.patch("secrets.token_hex", lambda nbytes: chance.randbytes(nbytes).hex()),
            mock.patch("os.cpu_count", return_value=1),
        ):
            self.patches.enter_context(patch)
        self.reader = Packs(self.path, None)

    def teardown(self) -> None:
        self.patches.close()
        self.reader.close()
        shutil.rmtree(self.folder)

    @initialize(is_encrypted=st.booleans())
    def choose_key(self, is_encrypted: bool) -> None:
        self.master = MasterKey(secret=os.urandom(32)) if is_encrypted else None
        self.reader = Packs(self.path, self.master)

    @property
    def live(self) -> dict[bytes, bytes]:
        return {id_: content for chunks in self.snapshots.values() for id_, content in chunks.items()}

    def names(self, suffix: str) -> list[str]:
        if not self.is_there:
            return []
        return sorted(name for name in os.listdir(self.path) if name.endswith(suffix) and not name.startswith(DRAFT))

    @property
    def is_there(self) -> bool:
        return os.path.isdir(self.path)

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in Path(self.path).iterdir())

    @rule(name=st.sampled_from("abc"), numbers=st.lists(st.integers(0, 15), max_size=12), dies=Dies, kept=st.booleans())
    def create(self, name: str, numbers: list[int], dies: int | None, kept: bool) -> None:
        with breaking_disk(dies), Packs(self.path, self.master).begin(threads=0) as writer:
            chunks = {writer.add(memoryview(CONTENTS[number])): CONTENTS[number] for number in numbers}
            done = writer.commit()
            assert done.chunks == len(numbers)
            if kept:  # else the process died before it committed its snapshot
                self.snapshots[name] = chunks

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        del self.snapshots[data.draw(st.sampled_from(sorted(self.snapshots)))]

    @precondition(lambda self: self.is_there)
    @rule(dies=Dies)
    def prune(self, dies: int | None) -> None:
        before = self.nbytes
        with breaking_disk(dies):
            done = Packs(self.path, self.master).prune(lambda: self.live)
            assert done.faults == {}
            assert done.removed >= done.rewritten
            assert [name for name in os.listdir(self.path) if name.startswith(DRAFT)] == []
            assert bool(self.names(PACK)) == bool(self.live)
            assert before - self.nbytes == done.freed_nbytes
            again = Packs(self.path, self.master).prune(lambda: self.live)
            assert (again.removed, again.freed_nbytes) == (0, 0)

    @precondition(lambda self: self.is_there)
    @rule(dies=Dies)
    def rebuild(self, dies: int | None) -> None:
        with breaking_disk(dies):
            done = Packs(self.path, self.master).rebuild()
            assert (done.lost, done.faults) == ({}, {})
            assert done.chunks >= len(self.live)
            assert [name.removesuffix(PACK) for name in self.names(PACK)] == [
                name.removesuffix(INDEX) for name in self.names(INDEX)
            ]

    @precondition(lambda self: self.names(INDEX))
    @rule(data=st.data(), is_gone=st.booleans())
    def lose_an_index(self, data: st.DataObject, is_gone: bool) -> None:
        path = Path(self.path, data.draw(st.sampled_from(self.names(INDEX))))
        if is_gone:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1])

    @precondition(lambda self: self.names(PACK))
    @rule()
    def lose_the_key(self) -> None:
        Path(self.path, "key").unlink(missing_ok=True)
        Packs(self.path, self.master).rebuild()

    @precondition(lambda self: self.master is not None and self.is_there and "key" in os.listdir(self.path))
    @rule(dies=Dies)
    def rotate(self, dies: int | None) -> None:
        old, new = self.master, MasterKey(secret=os.urandom(32))
        assert old is not None
        is_done = False
        with breaking_disk(dies):
            assert Packs(self.path, old).rotate(new).faults == {}
            is_done = True
        if not is_done:  # either key opens everything; and it can be done again
            for master in (new, old):
                try:
                    self.master = master
                    self.all_that_is_needed_is_there()
                    break
                except CorruptError:
                    assert master is new
            assert Packs(self.path, old).rotate(new).faults == {}
        self.master = new
        self.reader = Packs(self.path, new)
        for name in self.names(PACK):
            content = Path(self.path, name).read_bytes()
            assert old.id not in content[:8192]

    @invariant()
    def all_that_is_needed_is_there(self) -> None:
        packs = Packs(self.path, self.master)
        for id_, content in self.live.items():
            assert packs.get(id_) == content

    @invariant()
    def who_has_looked_before_finds_it_as_well(self) -> None:
        for id_, content in self.live.items():
            assert self.reader.get(id_) == content


TestChunks = Chunks.TestCase
TestChunks.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
