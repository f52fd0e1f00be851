"""Headers too young to be recorded: a successor knows them, the index never does."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.helpers.models import every_dtype, write_safetensors
from weightfs import Role, ledger
from weightfs.index import young
from weightfs.index.schema import FileRecord
from weightfs.index.store import IndexStore
from weightfs.index.young import YoungFile
from weightfs.ledger import Ledger
from weightfs.library import Library
from weightfs.source.local import LocalSource


@pytest.fixture
def book() -> Iterator[int]:
    fd = ledger.create()
    yield fd
    os.close(fd)


def young_file(base: int, tensors: int = 3) -> YoungFile:
    rows = [(f"t{number}", "F32", (1,), 4 * number, 4, None, Role.OTHER) for number in range(tensors)]
    record = FileRecord(base, "safetensors", rows, {}, False, None)  # type: ignore[arg-type]
    return YoungFile(b"i" * 16, b"folder/file", "file.safetensors", record)


def test_a_successor_finds_a_view_that_is_too_young_to_be_recorded(
    state: str, book: int, tmp_path: os.PathLike[str]
) -> None:
    root = os.path.join(tmp_path, "source")
    write_safetensors(f"{root}/model.safetensors", every_dtype())
    source = LocalSource(root)
    first = IndexStore(state, root, journal=Ledger(book))
    entry = source.lstat(b"model.safetensors")
    parsed = Library(source, first).parsed(b"model.safetensors", entry, "model.safetensors")
    assert not parsed.settled
    number = parsed.record.base + 4
    first.put_number(b"k" * 16, 5)
    first.close()  # which empties the journal

    successor = IndexStore(state, root, journal=Ledger(book))
    found = Library(source, successor).view(number)
    assert found is not None
    assert (found[0].identity, found[0].record, found[1:]) == (parsed.identity, parsed.record, (2, False))
    assert successor.owner_of_view(number) is None, "it is not in the index"
    successor.close()

    with_no_journal = IndexStore(state, root)
    assert Library(source, with_no_journal).view(number) is None
    with_no_journal.close()
    source.close()


def test_one_that_was_recorded_meanwhile_is_not_noted_any_more(state: str, book: int) -> None:
    index = IndexStore(state, "source", journal=Ledger(book))
    index.put_young(young_file(1000))
    assert index.young_file(1005) == young_file(1000)
    index.put_owner(1000, b"i" * 16, b"folder/file", "file.safetensors")
    assert index.young_file(1005) is None
    index.close()


def test_runs_do_not_reach_into_each_other() -> None:
    noted: list[tuple[bytes, bytes, bytes]] = []
    files = young.YoungFiles(lambda *record: noted.append(record))
    files.put(young_file(1000))
    files.put(young_file(1000))
    files.put(young_file(2000))
    assert len(noted) == 2, "what is noted already is not noted again"
    found = {number: files.find(number) for number in (999, 1000, 1005, 1006, 2000, 2006)}
    bases = {number: file and file.record.base for number, file in found.items()}
    assert bases == {999: None, 1000: 1000, 1005: 1000, 1006: None, 2000: 2000, 2006: None}


def test_there_are_never_more_than_so_many() -> None:
    files = young.YoungFiles(lambda *_: True)
    for number in range(1, 1000):
        files.put(young_file(number * 10))
    assert files.find(10) is None
    assert files.find(9990) is not None


def test_what_another_version_wrote_is_passed_over() -> None:
    files = young.YoungFiles(lambda *_: True)
    files.take_over((1000).to_bytes(8, "big"), b"\x93\x01\x02\x03")
    assert files.find(1000) is None
