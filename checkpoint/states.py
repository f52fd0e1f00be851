"""The states of a CUDA process under the driver's checkpoint API, and the ways between them.

    running --lock--> locked --checkpoint--> checkpointed
    running <-unlock- locked <--restore----- checkpointed

Numbers and transitions are those of `CUprocessState` and of the functions `cuCheckpointProcess...` in the CUDA driver
API's chapter "CUDA Checkpointing" (driver 570 and newer). Pure.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from types import MappingProxyType
from typing import Final


class State(IntEnum):
    """What the driver says of a CUDA process."""

    RUNNING = 0
    LOCKED = 1  # its CUDA calls block
    CHECKPOINTED = 2  # its GPU memory is in host memory; it holds no GPU
    FAILED = 3  # the driver gave it up: no way leads out
    # Between two calls of a tool that keeps GPU memory in a storage of its own (driver 595 and newer); never ours.
    CHECKPOINTING = 4
    RESTORING = 5

    @property
    def word(self) -> str:
        """Its name as users see it."""
        return self.name.lower()


class Step(Enum):
    """A call that moves a process from one state to the next."""

    LOCK = "lock"
    CHECKPOINT = "checkpoint"
    RESTORE = "restore"
    UNLOCK = "unlock"

    @property
    def before(self) -> State:
        """The state it starts from; from any other the driver answers 401 and changes nothing."""
        return _TRANSITIONS[self][0]

    @property
    def after(self) -> State:
        """The state it leads to."""
        return _TRANSITIONS[self][1]


_TRANSITIONS: Final = MappingProxyType(
    {
        Step.LOCK: (State.RUNNING, State.LOCKED),
        Step.CHECKPOINT: (State.LOCKED, State.CHECKPOINTED),
        Step.RESTORE: (State.CHECKPOINTED, State.LOCKED),
        Step.UNLOCK: (State.LOCKED, State.RUNNING),
    }
)
_DOWN: Final = (Step.LOCK, Step.CHECKPOINT)
_UP: Final = (Step.RESTORE, Step.UNLOCK)
_ALONG: Final = (State.RUNNING, State.LOCKED, State.CHECKPOINTED)


def way(now: State, wanted: State) -> tuple[Step, ...] | None:
    """The steps from one state to another, in order.

    Also what undoes a half-done operation: the way from where a process is to where it was found.

    Returns:
        None where there is none: out of `FAILED`, out of a state that is another tool's, or into one of these; the
        empty way from any state to itself.
    """
    if now is wanted:
        return ()
    if now not in _ALONG or wanted not in _ALONG:
        return None
    first, last = _ALONG.index(now), _ALONG.index(wanted)
    if first < last:
        return _DOWN[first:last]
    return tuple(step for step in _UP if last <= _ALONG.index(step.after) < first)
