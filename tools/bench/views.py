"""Tensors as files: each read for the first time while the weight file is in memory.

Before each sample the kernel is made to forget the mount's files (POSIX_FADV_DONTNEED); a sample then reads every
tensor once, opens included. The control reads the same bytes of the bare file. The second read, from the mount's own
cache, has no target.
"""

from __future__ import annotations

import functools
import os

from _harness import (
    MIB,
    Report,
    alternate,
    drop,
    mounted,
    parser,
    rate,
    read_through,
    resident,
    same_bytes,
    touched,
    workplace,
    write_safetensors,
)

_TENSORS = 8


def read_extents(path: str, extents: list[tuple[int, int]], buffer: memoryview) -> int:
    """The bytes of the tensors, from the weight file itself."""
    moved = 0
    for offset, nbytes in extents:
        with open(path, "rb", buffering=0) as file:
            moved += read_through(file.fileno(), buffer, offset=offset, nbytes=nbytes)
    return moved


def read_files(paths: list[str], buffer: memoryview) -> int:
    """Each file, whole."""
    moved = 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            moved += read_through(file.fileno(), buffer)
    return moved


def first_read(paths: list[str], buffer: memoryview) -> float:
    """GB/s over all files after the kernel forgot them."""
    for path in paths:
        if (left := drop(path)) > 0:
            raise SystemExit(f"{left:.1%} of {path} stay in memory: not a first read")
    return rate(lambda: read_files(paths, buffer), at_least_s=0)


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "").parse_args()
    report = Report("views", options)
    with workplace(options.folder) as place:
        folder = os.path.join(place, "source", "model")
        os.makedirs(folder)
        bare = os.path.join(folder, "model.safetensors")
        extents = write_safetensors(bare, _TENSORS, options.size * MIB // _TENSORS)
        buffer = touched(MIB)
        with mounted(os.path.join(place, "source"), place) as mount:
            report.describe(mount)
            model = os.path.join(mount.path, "model")
            raw = {name: os.path.join(model, ".tensors", "model", name) for name in extents}
            npy = {name: os.path.join(model, ".npy", "model", f"{name}.npy") for name in extents}
            for name, (offset, nbytes) in extents.items():
                if not same_bytes(bare, raw[name], offset=offset, nbytes=nbytes):
                    raise SystemExit(f"{raw[name]} has other bytes than the tensor")
            control = functools.partial(read_extents, bare, list(extents.values()), buffer)
            for what, paths in (("a .tensors/ file", list(raw.values())), ("a .npy/ file", list(npy.values()))):
                report.residency(f"first read of {what}: source", [bare])
                report.residency(f"first read of {what}: mount", [], share=max(drop(path) for path in paths))
                samples = alternate(
                    functools.partial(rate, control), functools.partial(first_read, paths, buffer), options.rounds
                )
                report.measure(f"first read of {what}, source warm", samples, "GB/s", 2.0, "at least")
                report.residency(f"second read of {what}: mount", [], share=min(resident(path) for path in paths))
                again = alternate(
                    functools.partial(rate, control),
                    functools.partial(rate, functools.partial(read_files, paths, buffer)),
                    options.rounds,
                )
                report.measure(f"second read of {what}", again, "GB/s", None, "at least")
            report.extra["requests"] = {
                "first read of all tensors": mount.requests_of(lambda: first_read(list(raw.values()), buffer))
            }
    report.finish()


if __name__ == "__main__":
    main()
