"""Which weight files a process tree uses, and the weightfs mount they lie on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final

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


def _plain(text: str) -> str:
    for escaped, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escaped, plain)
    return text
