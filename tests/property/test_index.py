"""Any damage to an index's file: it opens with the right records, or is set aside; nothing wrong, nothing crashes.

Everything that reads damaged pages does so in a child, many examples to each: a child that dies names the example.
"""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest

from tests.unit.support import python
from weightfs.index import store
from weightfs.index.schema import EntryRecord, Kind
from weightfs.index.store import IndexStore

RECORDS = 40

OPEN = (
    """
import json, logging, sys
from weightfs.errors import IndexStoreError
from weightfs.index import store
from weightfs.index.schema import EntryRecord, Kind
logging.disable()
store._QUIET_S = 0.0
last = int(sys.argv[1])
for line in sys.stdin:
    folder = line.strip()
    print("begin", folder, flush=True)
    index = store.IndexStore(folder, "source")
    for n in range(%d):
        number = index.number_of(b"key%%d" %% n)
        if number is None:
            continue
        assert number == 0 or index.set_aside is None or number >> 32 == index.epoch, "a number of the old epoch"
        entry = index.entry(number)
        assert entry is None or entry.name == b"name%%d" %% n, entry
    if index.set_aside is None:
        assert index.take() > last, "a number is given out twice"
    for turn in range(3):
        for n in range(30):
            index.put_entry(index.take(), EntryRecord(Kind.SOURCE, 1, b"x" * 200, b"y"))
        try:
            index.flush()
        except IndexStoreError:  # it may say that it has not written, once: by then it has begun anew
            index.flush()
    index.close()
    print("end", flush=True)
"""
    % RECORDS
)


def made(folder: str) -> tuple[bytes, int]:
    """The bytes of an index of several commits, and the last number that it gave out."""
    index = IndexStore(folder, "source")
    last = 0
    for n in range(RECORDS):
        last = index.take()
        index.put_entry(last, EntryRecord(Kind.SOURCE, 1, b"name%d" % n, b"key%d" % n))
        index.put_number(b"key%d" % n, last)
        if n % 5 == 0:
            index.flush()
    index.close()
    with open(os.path.join(folder, "index.lmdb"), "rb") as file:
        return file.read(), last


def flipped(data: bytes, offset: int, bits: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ bits]) + data[offset + 1 :]


def check(base: str, examples: dict[str, bytes], last: int) -> None:
    folders = {}
    for name, data in examples.items():
        folder = os.path.join(base, name)
        os.makedirs(folder)
        with open(os.path.join(folder, "index.lmdb"), "wb") as file:
            file.write(data)
        folders[folder] = name
    done = python_with(OPEN, "\n".join(folders), str(last))
    begun = [line.split()[1] for line in done[1].splitlines() if line.startswith("begin")]
    assert done[0] == 0, f"{folders[begun[-1]]}: status {done[0]}: {done[2].strip().splitlines()[-1:]}"
    for folder in folders:
        shutil.rmtree(folder)


def python_with(code: str, stdin: str, *arguments: str) -> tuple[int, str, str]:
    feed = f"import io, sys; sys.stdin = io.StringIO({json.dumps(stdin)})\n"
    done = python(feed + code, *arguments, timeout_s=100)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(autouse=True)
def _prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_QUIET_S", 0.0)


def test_a_flipped_byte_in_each_page(tmp_path: os.PathLike[str]) -> None:
    data, last = made(os.path.join(tmp_path, "whole"))
    examples = {}
    choose = random.Random(20260101)
    for page in range(0, len(data), 4096):
        used = [at for at in range(page, page + 4096) if data[at]] or [page]
        for at in choose.sample(used, min(4, len(used))):
            bits = choose.randrange(1, 256)
            examples[f"byte-{at}-xor-{bits}"] = flipped(data, at, bits)
    check(str(tmp_path), examples, last)


@pytest.mark.parametrize(
    ("offset", "bits"),
    [(1 * 4096 + 44, 236), (6 * 4096, 179), (14 * 4096 + 4064, 186), (14 * 4096 + 4008, 149), (14 * 4096 + 4016, 27)],
)
def test_flips_in_the_list_of_free_pages(tmp_path: os.PathLike[str], offset: int, bits: int) -> None:
    """Found by chance: they pass the walk, which reads records only, and show at the first write."""
    data, last = made(os.path.join(tmp_path, "whole"))
    check(str(tmp_path), {f"byte-{offset}-xor-{bits}": flipped(data, offset, bits)}, last)


def test_an_index_cut_anywhere(tmp_path: os.PathLike[str]) -> None:
    data, last = made(os.path.join(tmp_path, "whole"))
    choose = random.Random(7)
    sizes = {choose.randrange(1, len(data)) for _ in range(12)} | {1, 4096, 8192, len(data) - 1}
    check(str(tmp_path), {f"cut-{size}": data[:size] for size in sizes}, last)


def test_any_bytes(tmp_path: os.PathLike[str]) -> None:
    choose = random.Random(11)
    data, last = made(os.path.join(tmp_path, "whole"))
    examples = {f"bytes-{size}": choose.randbytes(size) for size in (1, 100, 4096, 20000)}
    for turn in range(8):
        at, size = choose.randrange(len(data)), choose.randrange(1, 9000)
        examples[f"patch-{turn}"] = (data[:at] + choose.randbytes(size) + data[at + size :])[: len(data)]
    check(str(tmp_path), examples, last)
