"""The programs and libraries that a process has mapped to run them, and whether they are the same where it is restored.

CRIU maps them again by their paths. It compares mode, size and the ELF build ID, where there is one, in the middle of a
restore; a library without one that has other code is mapped without a word. So a snapshot keeps what they were, and a
restore compares before anything is touched. A build ID is a few reads away, and is another one for other code (ld(1),
--build-id); what has none, or is no ELF, is digested, and the cache knows it the next time.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Final

from checkpoint.digest_cache import DigestCache
from checkpoint.errors import CheckpointError
from checkpoint.fingerprint import Difference
from checkpoint.manifest import Program
from checkpoint.processes import Process

_WHY: Final = "the process has it mapped, and would run other code"
_ELF64_LITTLE: Final = b"\x7fELF\x02\x01"
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_NOTE: Final = struct.Struct("<III")
_PT_NOTE: Final = 4
_NT_GNU_BUILD_ID: Final = 3
_MOST_BYTES: Final = 1 << 16
"""Of notes that are looked at: they take some hundred bytes."""


def mapped(processes: Sequence[Process]) -> list[str]:
    """Paths of the files that a tree can execute code of."""
    return sorted(
        {
            one.path
            for process in processes
            for one in process.mappings
            if "x" in one.perms and one.is_file and not one.is_deleted and not one.path.startswith("/dev/")
        }
    )


def identify(paths: Iterable[str], *, cache: DigestCache | None = None, root: str = "/") -> list[Program]:
    """What they are.

    Args:
        paths: absolute, as the process sees them; what is not there under its name is left out.
        cache: of digests.
        root: the process's root folder as seen from here, such as `/proc/7/root`.

    Raises:
        CheckpointError: one can't be read.
        RetryError: one changed while it was read.
    """
    found: list[Program] = []
    without = {}
    for path in paths:
        where = _seen(root, path)
        try:
            status = os.stat(where)
        except OSError:
            continue
        build_id = build_id_of(where)
        found.append(Program(path=path, nbytes=status.st_size, state=_state(status), build_id=build_id))
        if not build_id:
            without[where] = len(found) - 1
    if without:
        from checkpoint.weights import digests  # hardly ever is there one

        for where, digested in digests(without, cache).items():
            one = found[without[where]]
            found[without[where]] = Program(
                path=one.path, nbytes=one.nbytes, state=one.state, build_id="", blake3=digested.blake3
            )
    return found


def compared(
    programs: Iterable[Program], *, cache: DigestCache | None = None, root: str = "/", has_own_mounts: bool = False
) -> list[Difference]:
    """What of a snapshot's programs is another one here, or is gone. What has not been touched is not read.

    Args:
        programs: of the snapshot.
        cache: of digests.
        root: the folder that will be the process's root, as seen from here.
        has_own_mounts: whether it may bring them along, so that one which is not here need not be gone.

    Raises:
        CheckpointError: one can't be read.
        RetryError: one changes as it is read.
    """
    return list(_compared(programs, cache, root, has_own_mounts=has_own_mounts))


def _compared(
    programs: Iterable[Program], cache: DigestCache | None, root: str, *, has_own_mounts: bool
) -> Iterator[Difference]:
    for one in programs:
        where = _seen(root, one.path)
        try:
            status = os.stat(where)
        except OSError as e:
            if not has_own_mounts:
                yield _differs(one, "there", os.strerror(e.errno or 0))
            continue
        if status.st_size != one.nbytes:
            yield _differs(one, f"{one.nbytes} bytes", f"{status.st_size} bytes")
        elif _state(status) == one.state:
            continue
        elif one.build_id:
            if (here := build_id_of(where)) != one.build_id:
                yield _differs(one, f"build ID {one.build_id}", f"build ID {here or 'none'}")
        else:
            from checkpoint.weights import digests

            if (digest := digests([where], cache)[where].blake3) != one.blake3:
                yield _differs(one, f"BLAKE3 {one.blake3}", f"BLAKE3 {digest}")


def build_id_of(path: str) -> str:
    """The build ID in an ELF file's notes, in hexadecimal; empty where it has none, or is no ELF file of 64 bits.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return _build_id(file)
    except OSError as e:
        raise CheckpointError(f"can't be read: {os.strerror(e.errno or 0)}", path=path) from e


def _build_id(file: BinaryIO) -> str:
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_ELF64_LITTLE):
        return ""
    fields = _HEADER.unpack(head)
    offset, entry_bytes, count = fields[5], fields[9], fields[10]
    if entry_bytes != _SEGMENT.size or offset >= 1 << 62:
        return ""
    file.seek(offset)
    segments = file.read(count * entry_bytes)
    for number in range(len(segments) // entry_bytes):
        kind, _, where, _, _, nbytes, _, _ = _SEGMENT.unpack_from(segments, number * entry_bytes)
        if kind == _PT_NOTE and where < 1 << 62:
            file.seek(where)
            if found := _in_notes(file.read(min(nbytes, _MOST_BYTES))):
                return found
    return ""


def _in_notes(notes: bytes) -> str:
    at = 0
    while at + _NOTE.size <= len(notes):
        name_bytes, nbytes, kind = _NOTE.unpack_from(notes, at)
        at += _NOTE.size
        content = at + (name_bytes + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[at : at + name_bytes] == b"GNU\0":
            return notes[content : content + nbytes].hex()
        at = content + (nbytes + 3 & ~3)
    return ""


def _state(status: os.stat_result) -> str:
    """Stays as long as the bytes do; says nothing where it differs."""
    return f"{status.st_dev}:{status.st_ino}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _differs(one: Program, there: str, here: str) -> Difference:
    return Difference(what=one.path, snapshot=there, here=here, matters=True, why=_WHY)


def _seen(root: str, path: str) -> str:
    return os.path.join(root, path.lstrip("/"))
