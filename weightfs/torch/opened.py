"""One weight file, opened lazily: what `safetensors.safe_open` gives for torch."""

from __future__ import annotations

import os
from types import EllipsisType, TracebackType
from typing import Any, Final, Self, TypeAlias

import torch

from weightfs.torch.errors import ClosedFileError, NoSuchTensorError, UnknownChoiceError
from weightfs.torch.files import Path, Stored, WeightFile, stored
from weightfs.torch.forms import Form
from weightfs.torch.loader import Backend, Device, load_stored, torch_device

FRAMEWORKS: Final = ("pt", "torch", "pytorch")
"""Names that safetensors has for torch."""

Index: TypeAlias = int | slice | EllipsisType | torch.Tensor | list[Any] | tuple[Any, ...] | None


class Slice:
    """A tensor that is read when it is indexed. It may outlive the `safe_open` that gave it.

    Args:
        file: open.
        name: one of its tensors.
        device: where what is read is to be.
        backend: see `load_file`.
    """

    def __init__(self, file: WeightFile, name: str, device: torch.device, backend: Backend) -> None:
        self._file = file
        self._name = name
        self._device = device
        self._is_mapped = backend == "mmap" and device.type == "cpu"
        self._form = file.form(name)

    def get_shape(self) -> list[int]:
        """The shape as the header has it."""
        return list(self._file.tensors[self._name].shape)

    def get_dtype(self) -> str:
        """The dtype as the header spells it: `BF16`; of a GGUF file ggml's name of the type, `Q4_K`."""
        return self._file.tensors[self._name].dtype

    def __getitem__(self, index: Index) -> torch.Tensor:
        """What torch makes of the whole tensor and the index; of leading rows, only those are read.

        Raises:
            IndexError: from torch, as are its other errors.
            ShortReadError: the file ends early while it is read.
            OSError: it can't be read.
        """
        if self._is_mapped:
            return self._file.mapped(self._name)[index]
        wanted, rest = self._rows(index)
        return load_stored([wanted], self._device)[0][rest]

    def stored(self) -> Stored:
        """Where the whole tensor is."""
        return stored(self._file, self._name)

    def _rows(self, index: Index) -> tuple[Stored, Index]:
        """The rows that an index speaks of, and the index within them."""
        first, *others = index if isinstance(index, tuple) and index else (index,)
        whole, shape = self.stored(), self._form.shape
        if not shape or not isinstance(first, slice) or first.step not in (None, 1) or not whole.nbytes:
            return whole, index
        start, stop, _ = first.indices(shape[0])
        count = max(0, stop - start)
        row_bytes = whole.nbytes // shape[0]
        form = Form(self._form.dtype, (count, *shape[1:]))
        part = whole._replace(offset=whole.offset + start * row_bytes, form=form, nbytes=count * row_bytes)
        return part, (slice(None), *others)


class safe_open:  # noqa: N801 - the name it is known by
    """A weight file whose tensors are read one by one; drop-in for `safetensors.safe_open`.

    Args:
        filename: see `load_file`.
        framework: `pt`, which is all there is here.
        device: where tensors are to be.
        backend: see `load_file`.

    Raises:
        BadHeaderError: the header does not describe the file.
        UnknownChoiceError: the framework or backend is none that is known.
        OSError: it can't be opened or read.
    """

    def __init__(
        self, filename: Path, framework: str = "pt", device: Device = "cpu", *, backend: Backend = "mmap"
    ) -> None:
        if framework not in FRAMEWORKS:
            raise UnknownChoiceError(f"framework {framework} is invalid", mend="pt; safetensors has the others")
        if backend not in ("mmap", "pread"):
            raise UnknownChoiceError(f'backend "{backend}" is invalid (expected one of: "mmap", "pread")')
        self._device = torch_device(device)
        self._backend: Backend = backend
        self._path = os.fspath(filename)
        self._file: WeightFile | None = WeightFile(filename)

    def keys(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._open.tensors)

    def offset_keys(self) -> list[str]:
        """The names of all tensors, by offset."""
        return list(self._open.tensors)

    def metadata(self) -> dict[str, str] | None:
        """The header's own text entries; None where there are none."""
        return dict(self._open.layout.metadata) or None

    def get_tensor(self, name: str) -> torch.Tensor:
        """A whole tensor.

        Raises:
            NoSuchTensorError: the file has none of that name.
            NotInTorchError: torch has no such dtype.
            ShortReadError: the file ends early while it is read.
        """
        return self.get_slice(name)[...]

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor, by offset; to a GPU all of them at once."""
        file = self._open
        if self._backend == "mmap" and self._device.type == "cpu":
            return {name: file.mapped(name) for name in file.tensors}
        return dict(
            zip(file.tensors, load_stored([stored(file, name) for name in file.tensors], self._device), strict=True)
        )

    def get_slice(self, name: str) -> Slice:
        """A tensor that is read when it is indexed.

        Raises:
            NoSuchTensorError: the file has none of that name.
            NotInTorchError: torch has no such dtype.
        """
        file = self._open
        if name not in file.tensors:
            raise NoSuchTensorError(f"File does not contain tensor {name}", path=self._path)
        return Slice(file, name, self._device, self._backend)

    @property
    def _open(self) -> WeightFile:
        if self._file is None:
            raise ClosedFileError("File is closed", path=self._path)
        return self._file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # Slices still read from it: it is closed with the last of them.
        self._file = None
