"""The weight files that a process has open or mapped: what they are, and whether they still are.

CRIU opens files again by path and compares sizes at most: a file of the same size with other bytes is restored without
a word. So a snapshot keeps a digest of every weight file, and a restore compares before anything is touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from checkpoint.digest_cache import DigestCache
from checkpoint.digests import Digested, Identity, digest_files
from checkpoint.errors import CheckpointError, CorruptError, MisfitError, RetryError
from checkpoint.manifest import Manifest, Weight

_ANEW: Final = "bring the file back as it was, or make the snapshot anew"


class Identified(msgspec.Struct, frozen=True, kw_only=True):
    """Weight files as they were found.

    Attributes:
        weights: for the manifest, in the order of their paths.
        identities: by the path under which this process reaches the file, for `unchanged_since`.
    """

    weights: tuple[Weight, ...]
    identities: Mapping[str, Identity]


def identify(
    paths: Iterable[str], *, mountpoints: Iterable[str] = (), cache: DigestCache | None = None, root: str = "/"
) -> Identified:
    """Digest weight files; those the cache knows are not read.

    Args:
        paths: absolute, as the process that uses them sees them.
        mountpoints: of weightfs mounts, as that process sees them; what lies on one is known by its path below.
        cache: of digests.
        root: the process's root folder as seen from here, such as `/proc/7/root`.

    Raises:
        CheckpointError: one can't be read.
        RetryError: one changed while it was read.
    """
    below = sorted(mountpoints, key=len, reverse=True)
    at = {path: _seen(root, path) for path in sorted(set(paths))}
    found = digests(at.values(), cache)
    weights = []
    for path, where in at.items():
        mountpoint = next((one for one in below if path.startswith(one.rstrip("/") + "/")), None)
        weights.append(
            Weight(
                path=path if mountpoint is None else os.path.relpath(path, mountpoint),
                mountpoint=mountpoint,
                nbytes=found[where].identity.nbytes,
                blake3=found[where].blake3,
            )
        )
    return Identified(weights=tuple(weights), identities={where: found[where].identity for where in at.values()})


def check_weights(manifest: Manifest, *, cache: DigestCache | None = None, root: str = "/") -> Mapping[str, Identity]:
    """Whether every weight file of a snapshot has the bytes it had; files the cache knows are not read.

    Args:
        manifest: of the snapshot.
        cache: of digests.
        root: the folder that will be the process's root, as seen from here. What lies on a weightfs mount is looked for
            where that is mounted out here: CRIU takes such mounts from outside.

    Returns:
        The files' identities by path, for `unchanged_since`.

    Raises:
        MisfitError: one is not there.
        CorruptError: one has other bytes.
        CheckpointError: one can't be read.
    """
    at: dict[str, Weight] = {}
    for weight in manifest.weights:
        at[_out_here(weight, root)] = weight
    for where, weight in at.items():  # what shows without reading comes first
        _require_size(where, weight)
    try:
        found = digests(at, cache)
    except RetryError as e:
        raise CorruptError("changed while it was read", path=e.path, mend=_ANEW) from e
    for where, weight in at.items():
        if found[where].blake3 != weight.blake3:
            raise CorruptError("holds other weights than when the snapshot was made", path=where, mend=_ANEW)
    return {where: found[where].identity for where in at}


def seen_by(
    pid: int, manifest: Manifest, identities: Mapping[str, Identity], *, root: str = "/"
) -> dict[str, Identity]:
    """The same identities by the paths under which a process reaches its files, whatever mounts it has of its own.

    Args:
        pid: of the process.
        manifest: of its snapshot.
        identities: what `check_weights` gave.
        root: as given there.
    """
    found = {}
    for weight in manifest.weights:
        found[_seen(f"/proc/{pid}/root", _in_there(weight))] = identities[_out_here(weight, root)]
    return found


def unchanged_since(identities: Mapping[str, Identity]) -> None:
    """Look at files again, without reading them: after memory is filled and before the process is let go.

    Raises:
        CorruptError: one is not what it was.
    """
    for path, identity in identities.items():
        try:
            found = Identity.of(os.stat(path))
        except OSError as e:
            raise CorruptError(f"can't be found any more: {os.strerror(e.errno or 0)}", path=path, mend=_ANEW) from e
        if found != identity:
            raise CorruptError("changed meanwhile", path=path, mend=_ANEW)


def digests(paths: Iterable[str], cache: DigestCache | None) -> dict[str, Digested]:
    """Digests of files by path; those the cache knows are not read.

    Raises:
        CheckpointError: one can't be read.
        RetryError: one changed while it was read.
    """
    known: dict[str, Digested] = {}
    unknown = []
    for path in paths:
        try:
            identity = Identity.of(os.stat(path))
        except OSError as e:
            raise CheckpointError(f"can't be read: {os.strerror(e.errno or 0)}", path=path) from e
        if cache is not None and (digest := cache.get(identity)):
            known[path] = Digested(blake3=digest, identity=identity, started_ns=0)
        else:
            unknown.append(path)
    read = digest_files(unknown)
    if cache is not None and read:
        cache.put(read.values())
    return known | read


def _in_there(weight: Weight) -> str:
    return os.path.join(weight.mountpoint or "/", weight.path)


def _out_here(weight: Weight, root: str) -> str:
    return _seen(root, weight.path) if weight.mountpoint is None else _in_there(weight)


def _require_size(path: str, weight: Weight) -> None:
    try:
        nbytes = os.stat(path).st_size
    except OSError as e:
        raise MisfitError(
            f"the snapshot's weights are not there: {os.strerror(e.errno or 0)}",
            path=path,
            mend=f"mount them at {weight.mountpoint}" if weight.mountpoint else "bring the file back",
        ) from e
    if nbytes != weight.nbytes:
        raise CorruptError(f"has {nbytes} bytes; it had {weight.nbytes}", path=path, mend=_ANEW)


def _seen(root: str, path: str) -> str:
    return os.path.join(root, path.lstrip("/"))
