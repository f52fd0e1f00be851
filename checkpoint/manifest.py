"""What a snapshot is, as its manifest says: the document `manifest.json` of a snapshot's folder.

The file is one JSON document on one line, `{"blake3": DIGEST, "manifest": {...}}`, the digest being that of the inner
document's bytes as they stand: no byte of it can change unnoticed. It protects against damage, not against forgers; the
store does that, by owner and mode.

Names and command lines are bytes on Linux. They are kept as `os.fsdecode` gives them: what is no UTF-8 becomes lone
surrogates, which JSON escapes.
"""

from __future__ import annotations

import json
import math
import os
import re
from typing import Annotated, Any, Final, Literal

import blake3
import msgspec

from checkpoint.errors import CorruptError, MisfitError, SnapshotNameError
from checkpoint.fingerprint import Fingerprint

VERSION: Final = 3
"""Of the schema. Whoever adds, removes or reinterprets a key raises it; older ones are still read."""

MOST_BYTES: Final = 64 << 20
"""A manifest is never larger than this: tens of thousands of weights and images take 10 MiB."""

_SNAPSHOT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_IMAGE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:=+-]{0,254}", re.ASCII)
_BEFORE_DIGEST: Final = b'{"blake3": "'
_BEFORE_MANIFEST: Final = b'", "manifest": '
_END: Final = b"}\n"
_DIGEST_AT: Final = len(_BEFORE_DIGEST)
_MANIFEST_AT: Final = _DIGEST_AT + 64 + len(_BEFORE_MANIFEST)

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Id = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]


class Mount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The weightfs mount the process reads its weights from.

    Attributes:
        mountpoint: absolute, as the process sees it.
        source: the folder it shows.
    """

    mountpoint: str
    source: str


class Weight(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A weight file that a process has open or mapped.

    Attributes:
        path: relative to the mountpoint; absolute where it lies on no mount.
        mountpoint: of the mount it lies on, None where it lies on none.
        nbytes: its size.
        blake3: of its bytes, 64 hexadecimal digits.
    """

    path: str
    mountpoint: str | None
    nbytes: Count
    blake3: Digest


class Program(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A program or library that a process has mapped to execute it; see `checkpoint.programs`.

    Attributes:
        path: absolute, as the process sees it.
        nbytes: its size.
        state: device, inode and times, as text; while it is the same, so is the file. Tells nothing on another machine.
        build_id: of its ELF notes, in hexadecimal; empty where it has none.
        blake3: of its bytes; empty where there is a build ID.
    """

    path: str
    nbytes: Count
    state: str
    build_id: str = ""
    blake3: str = ""


class ImageFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that CRIU wrote.

    Attributes:
        name: without any folder.
        nbytes: its size.
        blake3: of its bytes, 64 hexadecimal digits; None where recipes stand for it, whose chunks are authenticated.
    """

    name: str
    nbytes: Count
    blake3: Digest | None = None


class Outside(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something outside of the tree that a process had open, beside its stdio, and that a restore is given anew.

    Attributes:
        resource: CRIU's name of it.
        kind: what may stand for it, see `attachments.Attachment`.
        path: what it was; of a file, where it is opened anew.
        can_read, can_write: how it was opened.
    """

    resource: str
    kind: Literal["file", "pipe", "tty", "socket"]
    path: str
    can_read: bool
    can_write: bool


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that is known of a snapshot.

    Attributes:
        version: of this schema.
        name: under which the store has it.
        id: of this snapshot among all there are: random, 32 hexadecimal digits.
        created_ns: when, since the epoch.
        generation: how often its processes had been restored when they were dumped.
        root_pid: the process that CRIU was given.
        pids: of all processes of the tree, the root's included.
        command: the root's command line. Nothing of its environment is kept.
        cuda_pids: those of them that use CUDA.
        gpu_bytes: what they held of each GPU, by its UUID.
        gpu_models: the model of every GPU of the machine, by its UUID; empty where none was used, and before version 2.
        stdio: what descriptors 0, 1 and 2 of the root led to.
        replaced: what of that is given anew at a restore: descriptor, CRIU's name for it, path of a log file or empty.
        outside: what else it had open outside of the tree, for which a restore gives something that has come to an end;
            empty before version 2.
        listeners: the TCP sockets that listened, as `ADDRESS:PORT`.
        cwd: the root's working folder.
        mount: where the weights come from, None where they lie on no weightfs mount.
        fingerprint: the machine it was made on.
        weights: every weight file in use.
        programs: every program and library mapped; empty before version 2.
        content: what the snapshot's folder holds: the files that CRIU wrote, or recipes for them.
        is_encrypted: whether recipes and chunks are; with which key, they say themselves.
        files: every file that CRIU wrote; of plain ones `Draft.commit` fills it in.
        phases: how long each phase of making it took, in seconds, by name.
        point: the folder in which the process waits to be let go, None where it does not.
        hooks: whether the process itself said that it is warm, and so may have reseeded itself.
        bytes_logical: what a restore brings back: the sum of `files`; `Draft.commit` fills it in.
        bytes_by_kind: how many of these are `zeros`, `weights` and `chunks`; empty for a plain one.
        bytes_added: by how much its chunks made the store larger; 0 for a plain one.
        criu_options: those that restore needs as well, by name without dashes.
    """

    version: Count = VERSION
    name: str
    id: Id
    created_ns: Count
    generation: Count = 0
    root_pid: Count
    pids: list[Count]
    command: list[str]
    cuda_pids: list[Count] = []
    gpu_bytes: dict[str, Count] = {}
    gpu_models: dict[str, str] = {}
    stdio: list[str] = []
    replaced: list[tuple[int, str, str]] = []
    outside: list[Outside] = []
    listeners: list[str] = []
    cwd: str
    mount: Mount | None = None
    fingerprint: Fingerprint
    weights: list[Weight] = []
    programs: list[Program] = []
    content: Literal["plain", "recipes"] = "plain"
    is_encrypted: bool = False
    files: list[ImageFile] = []
    phases: dict[str, float] = {}
    point: str | None = None
    hooks: bool = False
    bytes_logical: Count = 0
    bytes_by_kind: dict[str, Count] = {}
    bytes_added: Count = 0
    criu_options: dict[str, Any] = {}


def require_name(name: str) -> None:
    """Refuse what can't be a snapshot's name: letters, digits, `.`, `_` and `-`, 128 at most, no dot or dash first.

    Raises:
        SnapshotNameError: it is none.
    """
    if not _SNAPSHOT_NAME.fullmatch(name):
        raise SnapshotNameError(
            f"{name!r} can't be a snapshot's name",
            mend="use up to 128 letters, digits, dots, dashes and underscores, a letter or digit first",
        )


def is_image_name(name: str) -> bool:
    """Whether a file of a snapshot may be called so: it stays in its folder and steers no terminal."""
    return _IMAGE_NAME.fullmatch(name) is not None


def encode(manifest: Manifest) -> bytes:
    """The content of `manifest.json`.

    Raises:
        ValueError: a number in it is none that JSON has.
    """
    inner = json.dumps(msgspec.to_builtins(manifest), ensure_ascii=True, allow_nan=False).encode("ascii")
    digest = blake3.blake3(inner).hexdigest().encode("ascii")
    return _BEFORE_DIGEST + digest + _BEFORE_MANIFEST + inner + _END


def decode(content: bytes, path: str) -> Manifest:
    """What the content of a `manifest.json` says.

    Args:
        content: all of it.
        path: where it was read, for errors.

    Raises:
        CorruptError: it is not what `encode` gave, or names something outside the snapshot.
        MisfitError: a newer weightfs wrote it.
    """
    if not (
        content.startswith(_BEFORE_DIGEST)
        and content[_DIGEST_AT + 64 : _MANIFEST_AT] == _BEFORE_MANIFEST
        and content.endswith(_END)
    ):
        raise _corrupt("is no manifest of a snapshot", path)
    inner = content[_MANIFEST_AT : -len(_END)]
    if blake3.blake3(inner).hexdigest().encode("ascii") != content[_DIGEST_AT : _DIGEST_AT + 64]:
        raise _corrupt("does not have the digest it was written with", path)
    try:
        document = json.loads(inner, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as e:
        raise _corrupt(f"is not JSON: {e}", path) from e
    version = document.get("version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise MisfitError(
            f"was written by a newer weightfs (schema {version}, this one reads up to {VERSION})",
            path=path,
            mend="restore it with the version that made it",
        )
    try:
        manifest = msgspec.convert(document, Manifest)
    except (msgspec.ValidationError, RecursionError, UnicodeError) as e:
        raise _corrupt(f"does not follow the schema: {e}", path) from e
    if fault := _fault_of(manifest):
        raise _corrupt(fault, path)
    return manifest


def _fault_of(manifest: Manifest) -> str | None:
    """What is wrong with the names in it."""
    if not _SNAPSHOT_NAME.fullmatch(manifest.name):
        return f"names the snapshot {manifest.name!r}"
    names = [file.name for file in manifest.files]
    for name in names:
        if not is_image_name(name):
            return f"names an image {name!r}"
    if len(set(names)) != len(names):
        return "names an image twice"
    if manifest.content == "plain" and any(file.blake3 is None for file in manifest.files):
        return "lacks the digest of an image"
    if manifest.mount is not None and not _is_plain(manifest.mount.mountpoint, absolute=True):
        return f"names a mountpoint {manifest.mount.mountpoint!r}"
    for weight in manifest.weights:
        if weight.mountpoint is not None and not _is_plain(weight.mountpoint, absolute=True):
            return f"names a mountpoint {weight.mountpoint!r}"
        if weight.path == "/" or not _is_plain(weight.path, absolute=weight.mountpoint is None):
            return f"names a weight file {weight.path!r}"
    for program in manifest.programs:
        if not _is_plain(program.path, absolute=True):
            return f"names a program {program.path!r}"
    return None


def _is_plain(path: str, *, absolute: bool) -> bool:
    """Whether a path is written in the one way that leads nowhere else: no `..`, no empty part, no NUL."""
    return (
        path not in ("", ".")
        and "\0" not in path
        and path.startswith("/") is absolute
        and ".." not in path.split("/")
        and os.path.normpath(path) == path
        and not path.startswith("//")
    )


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number


def _corrupt(message: str, path: str) -> CorruptError:
    return CorruptError(message, path=path, mend="make the snapshot anew")
