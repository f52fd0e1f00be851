"""Which weight files a process tree uses, and the weightfs mount they lie on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from checkpoint.errors import CheckpointError
from checkpoint.manifest import Mount
from checkpoint.processes import PROC, Process

_TYPE: Final = "fuse.weightfs"
_SUFFIXES: Final = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".npz", ".onnx")
_LEAST_BYTES: Final = 1 << 20
"""A `.bin` or `.pt` on no mount that is smaller is no weights."""


def mounts_seen(pid: int, *, proc: str = PROC) -> list[Mount]:
    """The weightfs mounts a process sees, the topmost first (proc(5), mountinfo)."""
    found = []
    with open(f"{proc}/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.rstrip("\n").partition(" - ")
            kind, source, *_ = after.split(" ")
            if kind == _TYPE:
                found.append(Mount(mountpoint=_plain(before.split(" ")[4]), source=_plain(source)))
    return found[::-1]


def weight_files(processes: Sequence[Process], mountpoints: Iterable[str]) -> list[str]:
    """Paths of all regular files on a weightfs mount that are open or mapped, and of weight files elsewhere."""
    below = tuple(one.rstrip("/") + "/" for one in mountpoints)
    found = set()
    for one in processes:
        paths = {each.target: each.size for each in one.descriptors if each.kind == "file" and not each.is_deleted}
        for mapped in one.mappings:
            if mapped.is_file and not mapped.is_deleted:
                paths.setdefault(mapped.path, mapped.offset + mapped.nbytes)
        for path, size in paths.items():
            if path.startswith(below) or (path.endswith(_SUFFIXES) and size >= _LEAST_BYTES):
                found.add(os.path.normpath(path))
    return sorted(found)


def named_weights(
    arguments: Iterable[str], mountpoints: Iterable[str], *, cwd: str, root: str = "/", given: Iterable[str] = ()
) -> list[str]:
    """Weight files that a process may have read and closed: those that its command line names on a weightfs mount.

    A folder that is named stands for all weight files below it.

    Args:
        arguments: of its command line, as `PATH` or `--option=PATH`.
        mountpoints: of weightfs mounts, as it sees them.
        cwd: its working folder.
        root: its root folder as seen from here.
        given: paths that count wherever they lie.

    Returns:
        Absolute paths, as the process sees them, each file once.

    Raises:
        CheckpointError: a path of `given` is not there.
    """
    below = tuple(one.rstrip("/") + "/" for one in mountpoints)
    paths = (each for one in arguments for each in (one, one.partition("=")[2]))
    candidates = [os.path.normpath(os.path.join(cwd, each)) for each in paths if each]
    wanted = [one for one in candidates if f"{one}/".startswith(below)] if below else []
    for path in given:
        if not os.path.exists(_seen(root, os.path.abspath(path))):
            raise CheckpointError("holds no weights: it is not there", path=path)
        wanted.append(os.path.abspath(path))
    found: dict[tuple[int, int], str] = {}
    for path in wanted:
        for each in _weights_at(path, root):
            status = os.stat(_seen(root, each))
            found.setdefault((status.st_dev, status.st_ino), each)
    return sorted(found.values())


def _weights_at(path: str, root: str) -> Iterator[str]:
    """The weight file of that path, or all below it."""
    where = _seen(root, path)
    if os.path.isfile(where):
        if path.endswith(_SUFFIXES):
            yield path
        return
    for folder, _, names in os.walk(where):
        for name in sorted(names):
            if name.endswith(_SUFFIXES) and os.path.isfile(os.path.join(folder, name)):
                yield os.path.normpath(os.path.join(path, os.path.relpath(folder, where), name))


def _seen(root: str, path: str) -> str:
    return os.path.join(root, path.lstrip("/"))


def _plain(text: str) -> str:
    for escaped, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escaped, plain)
    return text
