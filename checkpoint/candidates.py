"""The weight files whose bytes a process's memory may hold: those in use, and those that it has read and closed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from checkpoint import in_use
from checkpoint.digest_cache import DigestCache
from checkpoint.digests import Identity
from checkpoint.manifest import Mount, Weight
from checkpoint.processes import Process
from checkpoint.weights import Identified, identify


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """See the module.

    Attributes:
        paths: of those that are open or mapped, as the process sees them.
        used: the same, so that a restore needs them.
        others: a restore needs them where memory has parts of them.
    """

    paths: Sequence[str]
    used: Identified
    others: Identified

    @property
    def weights(self) -> list[Weight]:
        """All of them, those in use first."""
        return [*self.used.weights, *self.others.weights]

    @property
    def identities(self) -> Mapping[str, Identity]:
        """Of all, in this order."""
        return {**self.used.identities, **self.others.identities}


def candidates(
    tree: Sequence[Process],
    mounts: Sequence[Mount],
    cache: DigestCache,
    *,
    plain: bool = False,
    command: Sequence[str] = (),
    given: Iterable[str] = (),
) -> Candidates:
    """Find and digest them.

    Args:
        tree: root first.
        mounts: weightfs mounts that the root sees.
        cache: of digests.
        plain: memory is kept as it is: only those in use matter.
        command: what the root was started with, besides the command lines that the kernel tells.
        given: files, or folders of them, that somebody has named.

    Raises:
        CheckpointError: one can't be read, or is not there though it was given.
        RetryError: one changed while it was read.
    """
    root, mountpoints = f"/proc/{tree[0].pid}/root", [one.mountpoint for one in mounts]

    def identified(paths: Iterable[str]) -> Identified:
        return identify(paths, mountpoints=mountpoints, cache=cache, root=root)

    paths = in_use.weight_files(tree, mountpoints)
    used = identified(paths)
    named: list[str] = []
    if not plain:
        arguments = [one for process in tree for one in process.cmdline] + list(command)
        named = in_use.named_weights(arguments, mountpoints, cwd=tree[0].cwd, root=root, given=given)
    known = {(one.device, one.inode) for one in used.identities.values()}
    others = identified(one for one in named if _key(root, one) not in known)
    return Candidates(paths=paths, used=used, others=others)


def _key(root: str, path: str) -> tuple[int, int]:
    found = os.stat(os.path.join(root, path.lstrip("/")))
    return found.st_dev, found.st_ino
