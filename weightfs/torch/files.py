"""Weight files, open and with their headers read, as the rest of weightfs.torch takes them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Final, NamedTuple, Self

import torch

from weightfs.errors import FormatError, IntegrityError, WeightfsError
from weightfs.formats import TensorExtent, WeightLayout, check_shards
from weightfs.formats.gguf import parse_gguf
from weightfs.formats.safetensors import parse_safetensors
from weightfs.formats.shards import MAX_INDEX_BYTES, format_of, group_shards, parse_weight_map
from weightfs.model import read_exactly
from weightfs.torch.errors import BadHeaderError
from weightfs.torch.forms import Form, form_of

Path = str | os.PathLike[str]
_MAGIC: Final = b"GGUF"
"""No length of a safetensors header that the format allows begins with these bytes."""


class WeightFile:
    """One weight file, open for reading. Any thread may use it; what was got from it outlives it.

    Args:
        path: any name: what is in the file says which format it has, as blobs of a hub's cache have no suffix.

    Attributes:
        path: as given.
        layout: what its header says.

    Raises:
        BadHeaderError: the header does not describe the file.
        OSError: it can't be opened or read, or is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = os.fspath(path)
        self._fd = _opened(self.path)
        self._mapping: torch.UntypedStorage | None = None
        try:
            self.size_bytes = os.fstat(self._fd).st_size
            self.layout = _layout(self.path, self._fd, self.size_bytes)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorExtent] = {one.name: one for one in self.layout.tensors}

    def fileno(self) -> int:
        """The descriptor, which stays this object's."""
        return self._fd

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd < 0

    def form(self, name: str) -> Form:
        """Dtype and shape in torch of one of its tensors."""
        return form_of(self.tensors[name], self.layout)

    def mapped(self, name: str) -> torch.Tensor:
        """A tensor in main memory whose pages are those of the file until they are written to.

        Writing changes this tensor and neither the file nor anybody else's: the mapping is private. As with
        safetensors, whoever truncates the file kills the process that reads the tensor later (SIGBUS).
        """
        extent, (dtype, shape) = self.tensors[name], self.form(name)
        if not extent.nbytes:
            return torch.empty(shape, dtype=dtype)
        if self._mapping is None:
            # By the descriptor, for the name may be another file's by now. Torch closes the one that it opens.
            self._mapping = torch.UntypedStorage.from_file(f"/proc/self/fd/{self._fd}", False, self.size_bytes)
        part = self._mapping[extent.offset : extent.offset + extent.nbytes]
        if part.data_ptr() % dtype.itemsize:
            # The format aligns nothing. Code for vectors may fault where a number lies across two of them.
            part = part.clone()
        return torch.empty(0, dtype=dtype).set_(part, 0, shape)

    def close(self) -> None:
        """Close the descriptor; mapped tensors stay. A second call does nothing."""
        fd, self._fd = self._fd, -1
        self._mapping = None
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


class Stored(NamedTuple):
    """A tensor, or some of its rows, as bytes of a file.

    Attributes:
        file: open.
        extent: the whole tensor.
        offset: of the first byte wanted, in the file.
        form: in torch, of what is wanted.
        nbytes: of what is wanted.
    """

    file: WeightFile
    extent: TensorExtent
    offset: int
    form: Form
    nbytes: int


def stored(file: WeightFile, name: str) -> Stored:
    """A whole tensor of a file."""
    extent = file.tensors[name]
    return Stored(file, extent, extent.offset, file.form(name), extent.nbytes)


def find_files(paths: Path | Iterable[Path]) -> list[str]:
    """The weight files that are meant by a file, a folder that holds one model, or a list of files.

    Of a folder with an index, the files of its index; of another, its one set, all of whose shards must be there.

    Raises:
        FormatError: shards are missing, or the index is damaged.
        WeightfsError: the folder holds no weights, or several sets of them.
        OSError: the folder can't be listed.
    """
    if not isinstance(paths, str | os.PathLike):
        return [os.fspath(path) for path in paths]
    path = os.fspath(paths)
    return _in_folder(path) if os.path.isdir(path) else [path]


def _in_folder(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if format_of(entry.name) and entry.is_file()}
    sets = group_shards(names)
    if "model" in sets:  # beside what else is there, as `consolidated`: transformers and vLLM take it as well
        sets = {"model": sets["model"]}
    if len(sets) != 1:
        what = f"several sets of weights: {', '.join(sets)}" if sets else "no weight files"
        raise WeightfsError(f"holds {what}", path=folder, mend="name the files" if sets else None)
    ((name, files),) = sets.items()
    index = os.path.join(folder, f"{name}.safetensors.index.json")
    try:
        if os.path.exists(index):
            files = _of_index(index)
            if absent := sorted(set(files) - names):  # also what would lead out of the folder
                raise FormatError("missing-shard", f"its index names {absent[0]!r}, which is not there", offset=0)
        else:
            check_shards(files)
    except FormatError as error:
        error.path = error.path or folder
        raise
    return [os.path.join(folder, file) for file in files]


def _of_index(index: str) -> tuple[str, ...]:
    fd = _opened(index)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_INDEX_BYTES:
            raise FormatError("index-length", f"has {size} bytes, {MAX_INDEX_BYTES} at most", offset=0, path=index)
        return tuple(sorted(set(parse_weight_map(read_exactly(fd)(0, size)).values())))
    except IntegrityError as error:
        error.path = index
        raise
    finally:
        os.close(fd)


def _opened(path: str) -> int:
    # A FIFO is refused, not waited for.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(19, os.strerror(19), path)
    return fd


def _layout(path: str, fd: int, size: int) -> WeightLayout:
    read, name = read_exactly(fd), os.path.basename(path)
    try:
        is_gguf = size >= len(_MAGIC) and read(0, len(_MAGIC)) == _MAGIC
        return (parse_gguf if is_gguf else parse_safetensors)(name, size, read)
    except FormatError as error:
        raise BadHeaderError(error.reason, error.message, offset=error.offset, path=path) from error
    except IntegrityError as error:
        error.path = path
        raise


def by_name(files: Sequence[WeightFile]) -> dict[str, WeightFile]:
    """Which file has a tensor; in the order of files, and of offsets within each.

    Raises:
        FormatError: two files have a tensor of one name.
    """
    found: dict[str, WeightFile] = {}
    for file in files:
        for name in file.tensors:
            if (other := found.setdefault(name, file)) is not file:
                what = f"{name!r} is in {os.path.basename(other.path)} as well"
                raise BadHeaderError("duplicate-tensor", what, offset=file.tensors[name].offset, path=file.path)
    return found
