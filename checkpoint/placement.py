"""Which GPU of this machine takes the place of which GPU of a snapshot. Pure.

The driver moves a process between GPUs of one model, if it is told so for every GPU of the machine the snapshot was
taken on, also those the process did not use (`CUcheckpointGpuPair`). Nothing is moved without need: a process comes
back to the GPUs it had, if they are here and have the room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.cuda import Pair
from checkpoint.errors import MisfitError, RetryError
from checkpoint.nvml import Device


@dataclass(frozen=True, kw_only=True)
class Left:
    """A GPU of the machine a snapshot was taken on.

    Attributes:
        uuid: its UUID.
        name: its model.
        used_bytes: what the processes of the snapshot held of it; 0 where they did not use it.
    """

    uuid: str
    name: str
    used_bytes: int


def place(left: Sequence[Left], here: Sequence[Device]) -> tuple[Pair, ...]:
    """The pairs to restore with; none where every GPU in use takes its own place.

    Args:
        left: every GPU of the machine the snapshot was taken on.
        here: every GPU of this one, as free as it is now.

    Raises:
        MisfitError: there is no other GPU of a model that is needed, or fewer GPUs than the driver must be told of.
        RetryError: there are, but too little of their memory is free now.
    """
    own = {one.uuid: one for one in here}
    used = [one for one in left if one.used_bytes]
    if all(one.uuid in own and own[one.uuid].free_bytes >= one.used_bytes for one in used):
        return ()
    chosen = _chosen(used, here)
    # The others must be named as well; they stay where they are, if that place is not taken.
    rest = [one for one in left if one.uuid not in chosen]
    taken = set(chosen.values())
    for one in rest:
        if one.uuid in own and one.uuid not in taken:
            chosen[one.uuid] = one.uuid
            taken.add(one.uuid)
    for one in rest:
        if one.uuid not in chosen:
            successor = next((device for device in here if device.uuid not in taken and device.name == one.name), None)
            if successor is None:
                raise MisfitError(
                    f"the snapshot comes from a machine with {len(left)} GPUs, and the driver moves a process only"
                    f" where each of them has a counterpart: there is none for a second {one.name}",
                    mend="restore it where there are as many GPUs of that model",
                )
            chosen[one.uuid] = successor.uuid
            taken.add(successor.uuid)
    return tuple((one.uuid, chosen[one.uuid]) for one in left)


def _chosen(used: Sequence[Left], here: Sequence[Device]) -> dict[str, str]:
    """A GPU for each one in use: its own where that has room, else one that has; the one that needs most first."""
    free = {one.uuid: one for one in here}
    chosen: dict[str, str] = {}
    for one in sorted(used, key=lambda wanted: -wanted.used_bytes):
        alike = [device for device in free.values() if device.name == one.name]
        if not alike:
            raise MisfitError(
                f"GPU memory can be restored only to a GPU of the same model: no {one.name} is left for {one.uuid}",
                mend="nvidia-smi -L shows what is here",
            )
        roomy = [device for device in alike if device.free_bytes >= one.used_bytes]
        if not roomy:
            most = max(device.free_bytes for device in alike)
            raise RetryError(
                f"no {one.name} has the {one.used_bytes >> 20} MiB free that are needed, {most >> 20} MiB at most",
                mend="nvidia-smi shows who uses them",
            )
        # Its own, or the fullest one that will do, so that the emptier ones are left for those to come.
        best = min(roomy, key=lambda device: (device.uuid != one.uuid, device.free_bytes))
        chosen[one.uuid] = best.uuid
        del free[best.uuid]
    return chosen
