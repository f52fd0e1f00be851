"""Whatever becomes of the files of a store's chunks: each is read as it was, or CorruptError (exit 4) is raised."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.chunks import pack, sealing
from checkpoint.chunks.keys import MasterKey
from checkpoint.chunks.packs import Packs
from checkpoint.chunks.sealing import Cipher
from checkpoint.errors import CorruptError

MASTER, OTHER = MasterKey(secret=bytes(range(32))), MasterKey(secret=bytes(range(1, 33)))
CHOOSE = random.Random(1)
CONTENTS = [CHOOSE.randbytes(2000) for _ in range(6)] + [CHOOSE.randbytes(5) * 900 for _ in range(3)]


class Made:
    """A store of which every example damages a copy."""

    def __init__(self, folder: Path, master: MasterKey | None) -> None:
        self.original, self.path, self.master = folder / "original", folder / "packs", master
        packs = Packs(str(self.original), master)
        with packs.begin() as writer:
            self.ids = [writer.add(memoryview(content)) for content in CONTENTS]
            writer.commit()
        self.id = next(name for name in os.listdir(self.original) if name.endswith(".pack")).removesuffix(".pack")
        self.kinds = {"pack": self.id + ".pack", "index": self.id + ".index", "key": "key"}

    def fresh(self, kind: str = "pack") -> Path:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.original, self.path)
        return self.path / self.kinds[kind]

    def refused(self) -> int:
        """How many chunks are refused; the others are read as they were."""
        packs, count = Packs(str(self.path), self.master), 0
        for id_, content in zip(self.ids, CONTENTS, strict=True):
            into = bytearray(b"\xaa") * len(content)
            try:
                packs.read(id_, memoryview(into))
            except CorruptError as e:
                assert e.exit_code == 4
                assert into == b"\xaa" * len(content)
                count += 1
            else:
                assert into == content
        return count


@pytest.fixture(scope="module", params=Cipher, ids=lambda cipher: cipher.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealing, "preferred", lambda: request.param)
        return Made(tmp_path_factory.mktemp("store"), None if request.param is Cipher.NONE else MASTER)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["pack", "index", "key"]), at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_a_flipped_bit(made: Made, kind: str, at: int, bit: int) -> None:
    path = made.fresh(kind)
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    lost = {"index": 0, "key": len(CONTENTS), "pack": 1}[kind]
    if kind == "pack" and at < pack.START:
        lost = len(CONTENTS) if at < sealing.ENVELOPE_BYTES else 0
    elif kind == "pack" and at >= len(content) - pack.END_BYTES:
        lost = 0
    # Nothing is read of the heads in a pack that has an index.
    assert made.refused() in {lost, 0 if kind == "pack" else lost}


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["pack", "index", "key"]), nbytes=st.integers(0, 40_000))
def test_another_length(made: Made, kind: str, nbytes: int) -> None:
    path = made.fresh(kind)
    if path.stat().st_size != nbytes:
        os.truncate(path, nbytes)
        assert made.refused() == (0 if kind == "index" else len(CONTENTS))


@settings(max_examples=100, deadline=None)
@given(at=st.integers(pack.START, 20_000), bit=st.integers(0, 7), is_indexed=st.booleans())
def test_what_is_whole_is_found_again_and_the_rest_can_be_added(
    made: Made, at: int, bit: int, is_indexed: bool
) -> None:
    path = made.fresh()
    if not is_indexed:
        (made.path / made.kinds["index"]).unlink()
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << bit
    path.write_bytes(content)
    packs = Packs(str(made.path), made.master)
    done = packs.rebuild()
    assert done.faults == {} or at % len(content) < sealing.ENVELOPE_BYTES
    assert made.refused() == len(CONTENTS) - done.chunks
    if is_indexed and not done.faults:
        assert done.chunks >= len(CONTENTS) - 1
    again = packs.rebuild()
    assert (again.chunks, again.lost) == (done.chunks, done.lost)
    with packs.begin() as writer:
        assert [writer.add(memoryview(content)) for content in CONTENTS] == made.ids
        assert writer.commit().new_chunks == len(CONTENTS) - done.chunks
    assert made.refused() == 0
    packs.prune(lambda: made.ids)
    assert made.refused() == 0


@settings(max_examples=40, deadline=None)
@given(nbytes=st.integers(0, 20_000), is_indexed=st.booleans())
def test_of_a_pack_cut_off_what_is_left_is_found(made: Made, nbytes: int, is_indexed: bool) -> None:
    path = made.fresh()
    if not is_indexed:
        (made.path / made.kinds["index"]).unlink()
    whole = path.stat().st_size
    os.truncate(path, min(nbytes, whole - 1))
    done = Packs(str(made.path), made.master).rebuild()
    assert made.refused() == len(CONTENTS) - done.chunks
    if nbytes > pack.START + 4500:
        assert done.chunks >= 2


def test_swapped_chunks(made: Made) -> None:
    path = made.fresh()
    content = path.read_bytes()
    step = pack.HEAD_BYTES + 2000 + sealing.TAG_BYTES
    first, second = (content[pack.START + at : pack.START + at + step] for at in (0, step))
    for is_indexed in (True, False):
        path.write_bytes(content[: pack.START] + second + first + content[pack.START + 2 * step :])
        assert made.refused() == (2 if is_indexed else len(CONTENTS))
        path.with_suffix(".index").unlink(missing_ok=True)
    assert Packs(str(made.path), made.master).rebuild().chunks == len(CONTENTS) - 2


def another(made: Made, tmp_path: Path, master: MasterKey | None) -> Path:
    packs = Packs(str(tmp_path / "another"), master)
    with packs.begin() as writer:
        for content in CONTENTS:
            writer.add(memoryview(content))
        writer.commit()
    return next(path for path in Path(packs.folder.path).iterdir() if path.suffix == ".pack")


@pytest.mark.parametrize("how", ["of another store", "under another name", "not encrypted"])
def test_another_pack_in_its_place(made: Made, tmp_path: Path, how: str) -> None:
    path = made.fresh()
    if how == "under another name":
        path.rename(path.with_name("0" * 32 + ".pack"))
        path.with_suffix(".index").rename(path.with_name("0" * 32 + ".index"))
    else:
        theirs = another(made, tmp_path, None if how == "not encrypted" else made.master)
        for suffix in (".pack", ".index"):
            shutil.copy(theirs.with_suffix(suffix), path.with_suffix(suffix))
            shutil.copy(theirs.with_suffix(suffix), path.parent)
    assert made.refused() == len(CONTENTS)


@pytest.mark.parametrize("master", [None, OTHER, MASTER])
def test_another_key(made: Made, master: MasterKey | None) -> None:
    made.fresh()
    if master == made.master:
        assert made.refused() == 0
        return
    packs = Packs(str(made.path), master)
    actions: list[Callable[[], object]] = [
        lambda: packs.get(made.ids[0]),
        lambda: packs.begin().__enter__(),
        lambda: packs.prune(list),
        packs.rebuild,
    ]
    for action in actions:
        with pytest.raises(CorruptError, match="encrypted"):
            action()
    assert made.refused() == 0


def test_the_key_of_another_store(made: Made, tmp_path: Path) -> None:
    made.fresh()
    shutil.copy(another(made, tmp_path, made.master).parent / "key", made.path)
    assert made.refused() == len(CONTENTS)


def test_what_others_may_write_is_refused(made: Made) -> None:
    made.fresh().chmod(0o666)
    assert made.refused() == len(CONTENTS)
    made.fresh("index").chmod(0o666)  # the pack says the same
    assert made.refused() == 0


def test_what_is_no_file(made: Made, tmp_path: Path) -> None:
    path = made.fresh()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert made.refused() == len(CONTENTS)
    path.unlink()
    path.mkdir()
    assert made.refused() == len(CONTENTS)
