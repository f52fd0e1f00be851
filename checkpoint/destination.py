"""Whether a snapshot can be restored where it is to go: a root filesystem, a pid namespace, free pids, memory, GPUs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from checkpoint import programs
from checkpoint.criu_command import ROOT_TO_BE_NAMED, options_kept
from checkpoint.cuda import Pair
from checkpoint.cuda_helper import Cuda
from checkpoint.digest_cache import DigestCache
from checkpoint.errors import MisfitError, RetryError
from checkpoint.fingerprint import Difference, require_fit
from checkpoint.manifest import Manifest
from checkpoint.nvml import Device
from checkpoint.placement import Left, place
from checkpoint.preflight_memory import SPARE_BYTES, available
from checkpoint.processes import is_there, start_ticks

_WAITED_FOR_S: Final = 10.0
"""Init, or whoever started it, may be slow to wait for a process that was dumped."""
_LOOK_S: Final = 0.02
_CORE_OF_PID_1: Final = "core-1.img"


def is_container(manifest: Manifest) -> bool:
    """Whether its root is pid 1 of a pid namespace, which the images hold."""
    return any(file.name == _CORE_OF_PID_1 for file in manifest.files)


def require_placed(manifest: Manifest, *, root: str | None, own_namespaces: bool) -> None:
    """Refuse what can't be restored where it is to go.

    Args:
        manifest: of the snapshot.
        root: where the root filesystem of its container is mounted; None where it has none of its own.
        own_namespaces: whether it is to be a second instance, see `instances`.

    Raises:
        MisfitError: it can't.
    """
    inside = "or have the container run `weightfs snapshot run`, which needs neither"
    dumped = options_kept(manifest.criu_options).root
    if dumped == ROOT_TO_BE_NAMED and root is None:
        raise MisfitError(
            "the process had the root filesystem of a container", mend=f"mount it and name it with --root, {inside}"
        )
    if dumped is None and root is not None:
        raise MisfitError("the process had no mounts of its own, and takes no --root", mend="leave it away")
    if not is_container(manifest):
        return
    if own_namespaces:
        raise MisfitError("the process brings its own pid and network namespace", mend="leave --new-pidns away")
    if manifest.cuda_pids:
        raise MisfitError(
            "the process was pid 1 of a container and used a GPU: which of its processes did is not known any more",
            mend="make the snapshot with `weightfs snapshot run --create` inside the container",
        )


def require_free(manifest: Manifest) -> None:
    """Refuse pids that are taken. Those of processes that have ended are waited for, 10 s at most.

    Raises:
        RetryError: one is taken, or still held by a process that has ended.
    """
    until = time.monotonic() + _WAITED_FOR_S
    for pid in manifest.pids:
        while (since := start_ticks(pid)) is not None:
            if is_there(pid, since):
                raise RetryError(
                    f"pid {pid}, which a process of the snapshot has, is taken",
                    mend="end that process, or restore into a pid namespace of its own (--new-pidns)",
                )
            if time.monotonic() > until:
                raise RetryError(
                    f"pid {pid} is still held by a process that has ended: its parent does not wait for it",
                    mend=f"end its parent, which ps -o ppid= {pid} tells",
                )
            time.sleep(_LOOK_S)


def require_memory(manifest: Manifest) -> None:
    """See that there is memory for what the processes had in theirs: else others' processes would be ended for it.

    Raises:
        RetryError: there is too little now.
    """
    found = available()
    if manifest.bytes_logical + SPARE_BYTES > found.nbytes:
        raise RetryError(
            f"the processes had {manifest.bytes_logical >> 20} MiB in memory, and {found}",
            mend="end something else, or restore it later",
        )


def require_programs(manifest: Manifest, cache: DigestCache, *, root: str | None) -> None:
    """See that the programs and libraries which the process has mapped are here, and the same.

    Raises:
        MisfitError: one is not; carries all that are not.
        CheckpointError: one can't be read.
    """
    has_own_mounts = options_kept(manifest.criu_options).root is not None
    found = programs.compared(manifest.programs, cache=cache, root=root or "/", has_own_mounts=has_own_mounts)
    require_fit(manifest.name, found)


def require_gpus(manifest: Manifest, cuda: Cuda | None) -> tuple[tuple[Pair, ...], list[Difference]]:
    """See that what was in GPU memory has a place here.

    Returns:
        The pairs for `Cuda.restore_all`, none where each GPU in use is here; and what moves, for people.

    Raises:
        MisfitError: it has none, or the driver does not move a process; carries the GPUs there and here.
        RetryError: there is one, but too little of it is free now.
        CudaError: the driver can't be asked.
    """
    if not manifest.cuda_pids:
        return (), []
    if cuda is None:
        raise MisfitError(
            "the process used a GPU, and there is none here", mend="restore it where nvidia-smi shows one"
        )
    here = cuda.devices()
    models, used = manifest.gpu_models, manifest.gpu_bytes
    pairs: tuple[Pair, ...] = ()
    if models and not used.keys() <= {one.uuid for one in here} and not cuda.moves():
        why = "this driver restores only onto the very same GPU; driver 580 with cuda-bindings 13 moves a process"
        require_fit(manifest.name, [_gpus(manifest, here, why)])
    if models and cuda.moves():
        left = [Left(uuid=uuid, name=model, used_bytes=used.get(uuid, 0)) for uuid, model in models.items()]
        try:
            pairs = place(left, here)
        except MisfitError as e:
            require_fit(manifest.name, [_gpus(manifest, here, e.message)])
    cuda.require_free(used, pairs)
    return pairs, [_moved(models[old], old, new) for old, new in pairs if old in used and old != new]


def _gpus(manifest: Manifest, here: Sequence[Device], why: str) -> Difference:
    there = ", ".join(f"{model} ({uuid})" for uuid, model in manifest.gpu_models.items())
    found = ", ".join(f"{one.name} ({one.uuid})" for one in here) or "none"
    return Difference(what="GPUs", snapshot=there, here=found, matters=True, why=why)


def _moved(model: str, old: str, new: str) -> Difference:
    why = "the driver moves what it held to another GPU of the same model"
    return Difference(what=model, snapshot=old, here=new, matters=False, why=why)
