"""Headers parsed once, sets and views, faults; on real folders, without a filesystem above."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import (
    Tensor,
    safetensors_bytes,
    tensor,
    write_safetensors,
)
from tests.unit.support import Later
from weightfs import headers
from weightfs import library as module
from weightfs.errors import StaleError
from weightfs.formats import encode_name
from weightfs.index.schema import FileRecord
from weightfs.index.store import IndexStore
from weightfs.library import Library, ParsedFile
from weightfs.source.local import LocalSource

TENSORS = {"a": tensor("F32", (4, 2), 1), "b": tensor("BF16", (3,), 2), "c/d": tensor("U8", (5,), 3)}


@pytest.fixture
def root(tmp_path: Path) -> str:
    (tmp_path / "models").mkdir()
    return str(tmp_path / "models")


@pytest.fixture
def source(root: str) -> Iterator[LocalSource]:
    opened = LocalSource(root)
    yield opened
    opened.close()


@pytest.fixture
def library(source: LocalSource, index: IndexStore) -> Library:
    return Library(source, index)


def parse(library: Library, path: bytes, name: str | None = None) -> ParsedFile:
    return library.parsed(path, library._source.lstat(path), name or os.path.basename(os.fsdecode(path)))


def view_bytes(library: Library, place: tuple[ParsedFile, int]) -> bytes:
    parsed, position = place
    _, _, _, offset, nbytes, *_ = parsed.record.tensors[position]
    with open(os.path.join(os.fsencode(library._source.name), parsed.path), "rb") as file:
        return os.pread(file.fileno(), nbytes, offset)


def check(library: Library, folder: bytes, name: str, tensors: dict[str, Tensor]) -> None:
    views = library.view_set(folder, name)
    assert views is not None
    assert set(views.raw) == {os.fsencode(encode_name(tensor_name)) for tensor_name in tensors}
    for tensor_name, one in tensors.items():
        assert view_bytes(library, views.raw[os.fsencode(encode_name(tensor_name))]) == one.data, tensor_name


# Once


@pytest.mark.usefixtures("settled")
def test_a_header_is_parsed_once_by_all_who_share_the_index(
    root: str, source: LocalSource, library: Library, index: IndexStore
) -> None:
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    first = parse(library, b"m.safetensors")
    assert parse(library, b"m.safetensors") is first
    assert first.settled
    assert (library.headers_parsed, library.models) == (1, 1)
    index.flush()
    another = Library(source, index)
    second = parse(another, b"m.safetensors")
    assert another.headers_parsed == 0
    assert (second.record, second.layout) == (first.record, first.layout)


def test_a_young_file_is_remembered_in_memory_only(
    root: str, source: LocalSource, library: Library, index: IndexStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Later(0)
    monkeypatch.setattr(module, "time", clock)
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    young = parse(library, b"m.safetensors")
    assert not young.settled
    assert parse(library, b"m.safetensors") is young
    assert index.file(young.identity + b"safetensors") is None
    assert index.owner_of_view(young.record.base) is None
    assert library.view(young.record.base) == (young, 0, False)
    clock.ahead_ns = 10_000_000_000
    old = parse(library, b"m.safetensors")
    assert old.settled
    assert old.record.base == young.record.base, "its views stay what they are"
    assert index.file(old.identity + b"safetensors") == old.record
    assert library.headers_parsed == 2


def test_a_young_file_that_changes_unseen_gets_other_numbers(
    root: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the step of a file's times its content may change and its identity stay."""
    clock = Later(0)
    monkeypatch.setattr(module, "time", clock)
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    entry = library._source.lstat(b"m.safetensors")
    young = library.parsed(b"m.safetensors", entry, "m.safetensors")
    clock.ahead_ns = 10_000_000_000
    swapped = {"a": TENSORS["b"], "b": TENSORS["a"], "c/d": TENSORS["c/d"]}
    with open(f"{root}/m.safetensors", "r+b") as file:
        file.write(safetensors_bytes(swapped))
    monkeypatch.setattr(library._source, "fstat", lambda _: entry)
    old = library.parsed(b"m.safetensors", entry, "m.safetensors")
    assert old.record.tensors != young.record.tensors
    assert old.record.base != young.record.base


@pytest.mark.usefixtures("settled")
def test_a_replaced_file_is_parsed_anew_and_its_views_have_other_numbers(root: str, library: Library) -> None:
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    old = parse(library, b"m.safetensors")
    write_safetensors(f"{root}/new", {"z": TENSORS["a"]})
    os.replace(f"{root}/new", f"{root}/m.safetensors")
    new = parse(library, b"m.safetensors")
    assert library.headers_parsed == 2
    assert new.record.base >= old.record.base + 2 * len(TENSORS)
    found = library.view(old.record.base)
    assert found is not None
    assert found[0].identity == old.identity, "an old number still means the old content"
    check(library, b"", "m", {"z": TENSORS["a"]})


@pytest.mark.usefixtures("settled")
def test_a_moved_file_is_not_parsed_again(root: str, library: Library) -> None:
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    old = parse(library, b"m.safetensors")
    os.rename(f"{root}/m.safetensors", f"{root}/n.safetensors")
    os.link(f"{root}/n.safetensors", f"{root}/o.safetensors")
    # Rename and link change ctime, and with it the identity: what counts is that nothing wrong is remembered.
    for name in ("n", "o"):
        parsed = parse(library, os.fsencode(f"{name}.safetensors"))
        assert parsed.path == os.fsencode(f"{name}.safetensors")
        assert parsed.layout is not None
        assert old.layout is not None
        assert [t.name for t in parsed.layout.tensors] == [t.name for t in old.layout.tensors]
    parsed_before = library.headers_parsed
    for name in ("n", "o", "n"):
        parse(library, os.fsencode(f"{name}.safetensors"))
    assert library.headers_parsed == parsed_before


@pytest.mark.usefixtures("settled")
def test_one_file_under_two_names_of_different_formats(root: str, library: Library) -> None:
    """A blob linked as `.gguf` has a fault; that says nothing of the same blob linked as `.safetensors`."""
    write_safetensors(f"{root}/blob", TENSORS)
    wrong = parse(library, b"blob", "m.gguf")
    assert wrong.layout is None
    right = parse(library, b"blob", "m.safetensors")
    assert right.layout is not None
    assert right.record.format == "safetensors"


def test_a_file_that_changes_while_it_is_parsed_is_stale(
    root: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    entry = library._source.lstat(b"m.safetensors")
    os.utime(f"{root}/m.safetensors", ns=(1, 1))
    with pytest.raises(StaleError):
        library.parsed(b"m.safetensors", entry, "m.safetensors")
    parse_header = vars(headers)["parse_header"]

    def overtaken(*arguments: object) -> object:
        layout = parse_header(*arguments)
        os.utime(f"{root}/m.safetensors", ns=(2, 2))
        return layout

    monkeypatch.setattr(headers, "parse_header", overtaken)
    with pytest.raises(StaleError):
        parse(library, b"m.safetensors")
    assert library.models == 0


def test_memory_is_bounded_by_tensors(
    root: str, library: Library, monkeypatch: pytest.MonkeyPatch, settled: Later
) -> None:
    monkeypatch.setattr(module, "_MAX_TENSORS", 14)
    numbers = []
    for at in range(9):
        write_safetensors(f"{root}/{at}/m.safetensors", TENSORS)
        views = library.view_set(b"%d" % at, "m")
        assert views is not None
        numbers += [parsed.record.base + 2 * position for parsed, position in views.raw.values()]
    assert library.models == 14 // 3
    assert len(library._bases) == len(library._by_base) == library.models
    assert library._tensors == 3 * library.models
    assert len(library._sets) == len(library._recent) == 14 // 6
    assert all(library.view(number) is not None for number in numbers), "the index knows the rest"
    settled.passed_s += 10
    assert library.view_set(b"8", "m") is not None
    assert len(library._recent) == 1, "what is too old to be used is not kept"
    write_safetensors(f"{root}/large/m.safetensors", {f"t{n}": tensor("U8", (1,), n) for n in range(20)})
    large = library.view_set(b"large", "m")
    assert large is not None
    assert len(large.raw) == 20
    assert (library.models, library._tensors) == (1, 20), "one is kept whatever it holds"


@pytest.mark.usefixtures("settled")
def test_headers_read_at_once_give_one_record(root: str, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    read = vars(module)["read_record"]
    records: list[FileRecord | None] = []

    def overtaken(*arguments: Any, **options: Any) -> object:
        if not records:
            records.append(None)
            records.append(parse(Library(library._source, library._index), b"m.safetensors").record)
        return read(*arguments, **options)

    monkeypatch.setattr(module, "read_record", overtaken)
    assert parse(library, b"m.safetensors").record == records[1]


def test_a_young_file_that_was_indexed_since_keeps_the_numbers_given_out(
    root: str, library: Library, index: IndexStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Later(0)
    monkeypatch.setattr(module, "time", clock)
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    young = parse(library, b"m.safetensors")
    clock.ahead_ns = 10_000_000_000
    assert parse(Library(library._source, index), b"m.safetensors").record.base != young.record.base
    old = parse(library, b"m.safetensors")
    assert old.record == young.record == index.file(old.identity + b"safetensors")
    assert library.view(young.record.base) == (old, 0, False)


def test_memory_is_bounded(root: str, library: Library, monkeypatch: pytest.MonkeyPatch, settled: Later) -> None:
    monkeypatch.setattr(module, "_MAX_RUNS", 3)
    monkeypatch.setattr(module, "_MAX_SETS", 2)
    bases = []
    for number in range(8):
        write_safetensors(f"{root}/{number}.safetensors", {f"t{number}": TENSORS["a"]})
        assert library.view_set(b"", str(number)) is not None
        bases.append(parse(library, b"%d.safetensors" % number).record.base)
    assert library.models == 3
    assert len(library._bases) == len(library._by_base) == 3
    assert len(library._sets) == len(library._recent) == 2
    for number, base in enumerate(bases):  # from the index
        found = library.view(base + 1)
        assert found is not None
        assert (found[0].path, found[1:]) == (b"%d.safetensors" % number, (0, True))
    settled.passed_s += 10


# Numbers of views


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("restarted", [False, True])
def test_every_number_of_a_run_leads_to_its_tensor(
    root: str, source: LocalSource, library: Library, index: IndexStore, restarted: bool
) -> None:
    runs = {}
    for number, count in enumerate((1, 7, 3)):
        tensors = {f"t{n}": tensor("U8", (n + 1,), n) for n in range(count)}
        write_safetensors(f"{root}/{number}.safetensors", tensors)
        index.take(3)  # numbers of nobody's between the runs
        runs[number] = parse(library, b"%d.safetensors" % number)
    if restarted:
        index.flush()
        library = Library(source, index)
    for number, parsed in runs.items():
        base, count = parsed.record.base, len(parsed.record.tensors)
        for inode in range(base, base + 2 * count):
            found = library.view(inode)
            assert found is not None
            assert found[0].path == b"%d.safetensors" % number
            assert found[0].record == parsed.record
            assert found[1:] == divmod(inode - base, 2)
        for inode in (base - 1, base + 2 * count):
            assert library.view(inode) is None
    assert library.view(1) is None
    assert library.view((1 << 63) - 1) is None
    assert library.headers_parsed == (0 if restarted else 3)


def test_a_number_whose_content_the_index_lacks(library: Library, index: IndexStore) -> None:
    index.put_owner(1000, b"i" * 16, b"m.safetensors", "m.safetensors")
    assert library.view(1000) is None
