"""Weight files as tensors by name: what `safetensors.torch.load_file` gives, at the speed of the bus on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch

from prefetch.order import places
from weightfs.torch.asking import ask_for
from weightfs.torch.errors import BadHeaderError
from weightfs.torch.files import Path, Stored, WeightFile, by_name, find_files, stored
from weightfs.torch.memory import fill, placed

Device: TypeAlias = str | int | torch.device
Backend = Literal["mmap", "pread"]


class Blocks(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
        data: its values where torch has the type; else `uint8`, the blocks of a row as the last dimension.
        kind: ggml's name of the type, such as `Q4_K`.
        shape: in elements, outermost dimension first.
    """

    data: torch.Tensor
    kind: str
    shape: tuple[int, ...]


def load_file(filename: Path, device: Device = "cpu", *, backend: Backend = "mmap") -> dict[str, torch.Tensor]:
    """Load one weight file, as `safetensors.torch.load_file` does.

    On a GPU all of it is copied through pinned memory, in the order in which a model needs its layers. In main memory
    tensors are the file's own pages (a private mapping, as safetensors makes) until they are written to: loading costs
    no copy and no second memory.

    Args:
        filename: a `.safetensors` or `.gguf` file of any name, on a mount of weightfs or not.
        device: where the tensors are to be.
        backend: how main memory gets them: `mmap`; or `pread`, a copy made by several threads, which does not care
            what becomes of the file.

    Returns:
        The tensors by name, in the order of their offsets. Of a GGUF file as `load_gguf` has them in `data`.

    Raises:
        BadHeaderError: the header does not describe the file; a SafetensorError as well.
        NotInTorchError: torch has no such dtype; a SafetensorError as well.
        ShortReadError: the file ends early while it is read.
        OSError: it can't be opened or read.
    """
    return load_files([filename], device, backend=backend)


def load_files(
    paths: Path | Iterable[Path], device: Device = "cpu", *, backend: Backend = "mmap"
) -> dict[str, torch.Tensor]:
    """Load a folder that holds one model, or a list of its shards; see `load_file`.

    Args:
        paths: a folder, or files.
        device: see `load_file`.
        backend: see `load_file`.

    Returns:
        The tensors by name, file by file.

    Raises:
        FormatError: shards are missing, or two files have a tensor of one name.
        WeightfsError: the folder holds no weights, or several sets of them.
    """
    names = find_files(paths)
    ask_for(names)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(WeightFile(name)) for name in names]
        where = by_name(files)
        if backend == "mmap" and torch_device(device).type == "cpu":
            return {name: file.mapped(name) for name, file in where.items()}
        loaded = load_stored([stored(file, name) for name, file in where.items()], torch_device(device))
        return dict(zip(where, loaded, strict=True))


def load_gguf(filename: Path, device: Device = "cpu") -> dict[str, Blocks]:
    """Load a GGUF file: blocks as they are in the file, and what they are.

    Args:
        filename: the file.
        device: where the tensors are to be.

    Raises:
        BadHeaderError: the header does not describe the file, or it is no GGUF file.
        NotInTorchError: it is big-endian.
        OSError: it can't be opened or read.
    """
    with WeightFile(filename) as file:
        if file.layout.format != "gguf":
            raise BadHeaderError("magic", "is no GGUF file", offset=0, path=file.path)
        extents = file.tensors
        data = load_file(filename, device)
        return {name: Blocks(data[name], one.dtype, one.shape) for name, one in extents.items()}


def load_stored(wanted: Sequence[Stored], device: torch.device) -> list[torch.Tensor]:
    """New tensors on a device, one for each that is wanted, read in the order in which a model needs them.

    Raises:
        ShortReadError: a file ends before its tensor does.
        OSError: a file can't be read.
    """
    if device.type not in ("cpu", "cuda"):
        return [one.to(device) for one in load_stored(wanted, torch.device("cpu"))]
    order = in_order(wanted)
    ordered = [wanted[number] for number in order]
    tensors = placed(ordered, device)
    fill(ordered, tensors, device)
    found = dict(zip(order, tensors, strict=True))
    return [found[number] for number in range(len(wanted))]


def in_order(wanted: Sequence[Stored]) -> list[int]:
    """The numbers of what is wanted, as a model needs them: by layer, within one by file and offset."""
    where = [place for place, _ in places(one.extent for one in wanted)]
    files = {name: number for number, name in enumerate(dict.fromkeys(one.file.path for one in wanted))}
    return sorted(range(len(wanted)), key=lambda at: (where[at], files[wanted[at].file.path], wanted[at].offset))


def torch_device(device: Device) -> torch.device:
    """A device as torch has it: a number is a GPU's, as with safetensors."""
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
