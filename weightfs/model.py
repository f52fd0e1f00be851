"""Weight files read directly, mounted or not: layouts of folders, and whether headers tell the truth."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from weightfs.errors import FormatError, IntegrityError, ShortReadError, WeightfsError
from weightfs.formats import (
    ReadAt,
    WeightLayout,
    check_shards,
    format_of,
    group_shards,
    merge_shards,
    parse_header,
    parse_weight_map,
)
from weightfs.formats.shards import MAX_INDEX_BYTES


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one weight file's header is worth.

    Attributes:
        path: of the file; of the folder, for a fault of a set.
        faults: empty when it describes its file.
    """

    path: str
    faults: tuple[FormatError, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether no fault was found."""
        return not self.faults


def read_exactly(fd: int) -> ReadAt:
    """The `ReadAt` of an open descriptor, which stays the caller's."""

    def read(offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        while length:
            part = os.pread(fd, length, offset)
            if not part:
                raise ShortReadError(f"ends at byte {offset}, {length} bytes early")
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    return read


def file_layout(path: str) -> WeightLayout:
    """The layout of one weight file.

    Raises:
        FormatError: its header does not describe it.
        WeightfsError: it is no regular file, or can't be read.
    """
    if format_of(path) is None:
        raise WeightfsError("is no weight file", path=path, mend="names end in .safetensors or .gguf")
    with _regular(path) as file:
        try:
            return parse_header(os.path.basename(path), os.fstat(file).st_size, read_exactly(file))
        except IntegrityError as e:
            e.path = path
            raise
        except OSError as e:
            raise WeightfsError(f"can't be read: {os.strerror(e.errno or 0)}", path=path) from e


def folder_layouts(path: str) -> Mapping[str, WeightLayout]:
    """The layouts of a folder's sets, by set name.

    Raises:
        FormatError: a header, or what the shards say together, is wrong.
        WeightfsError: the folder or a file can't be read.
    """
    return {name: _merged(path, name, files) for name, files in _sets(path).items()}


def open_model(path: str | os.PathLike[str]) -> WeightLayout:
    """The layout of a weight file, or of a folder that holds one model.

    Raises:
        FormatError: a header does not describe its file.
        WeightfsError: nothing to read there, or a folder with several sets: name one of their files.
    """
    text = os.fspath(path)
    if not os.path.isdir(text):
        return file_layout(text)
    sets = _sets(text)
    if len(sets) != 1:
        what = f"several sets of weights: {', '.join(sets)}" if sets else "no weight files"
        raise WeightfsError(f"holds {what}", path=text, mend="name a weight file" if sets else None)
    (name, files) = next(iter(sets.items()))
    return _merged(text, name, files)


def verify(path: str) -> Iterator[Verdict]:
    """Examine a weight file, or every one below a folder; a folder is named once more for faults of a whole set.

    Raises:
        WeightfsError: there is nothing at `path`, or a folder can't be listed.
    """
    if not os.path.isdir(path):
        yield _verdict(path)
        return
    for folder, folders, _ in os.walk(path, onerror=_unlistable):
        folders.sort()
        for name, files in _sets(folder).items():
            verdicts = [_verdict(os.path.join(folder, file)) for file in files]
            yield from verdicts
            try:
                check_shards(files)
                if all(verdict.ok for verdict in verdicts):
                    _merged(folder, name, files)
            except FormatError as e:
                yield Verdict(e.path or folder, (e,))


def _verdict(path: str) -> Verdict:
    try:
        file_layout(path)
    except FormatError as e:
        return Verdict(path, (e,))
    except ShortReadError as e:
        return Verdict(path, (FormatError("short-read", e.message, offset=0, path=path),))
    return Verdict(path)


def _unlistable(error: OSError) -> None:
    raise WeightfsError(f"can't be listed: {os.strerror(error.errno or 0)}", path=error.filename)


def _sets(path: str) -> Mapping[str, tuple[str, ...]]:
    try:
        with os.scandir(path) as entries:
            return group_shards(entry.name for entry in entries if entry.is_file() and format_of(entry.name))
    except OSError as e:
        raise WeightfsError(f"can't be listed: {os.strerror(e.errno or 0)}", path=path) from e


def _merged(folder: str, name: str, files: tuple[str, ...]) -> WeightLayout:
    layouts = [file_layout(os.path.join(folder, file)) for file in files]
    index = os.path.join(folder, f"{name}.{layouts[0].format}.index.json")
    weight_map = None
    try:
        if os.path.exists(index):
            with _regular(index) as file:
                size = os.fstat(file).st_size
                if size > MAX_INDEX_BYTES:
                    raise FormatError("index-length", f"has {size} bytes, {MAX_INDEX_BYTES} at most", offset=0)
                weight_map = parse_weight_map(read_exactly(file)(0, size))
    except IntegrityError as e:
        e.path = index
        raise
    try:
        return merge_shards(layouts, weight_map)
    except FormatError as e:
        e.path = folder
        raise


class _regular:  # noqa: N801 - a function that happens to need an end
    """A descriptor of a regular file; a FIFO or device is refused, not waited for."""

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            raise WeightfsError(f"can't be opened: {os.strerror(e.errno or 0)}", path=path) from e
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise WeightfsError("is no regular file", path=path)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
