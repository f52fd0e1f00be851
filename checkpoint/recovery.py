"""Completes or undoes what commands that died have begun."""

from __future__ import annotations

from typing import Final

import msgspec

from checkpoint import journal, points
from checkpoint.errors import CheckpointError, CorruptError, RetryError
from checkpoint.journal import Entry
from checkpoint.processes import is_there
from checkpoint.store import Store
from checkpoint.tools import Tools

_CRIU_S: Final = 120.0
_AGAIN: Final = "weightfs snapshot recover tries again, and says which process it is"


class Recovered(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        kind: `create` or `restore`.
        name: of the snapshot.
        step: at which the command died.
        outcome: `undone`, `completed`, or `stuck`.
        fault: why it is stuck.
    """

    kind: str
    name: str
    step: str
    outcome: str
    fault: CheckpointError | None = None


def recover(tools: Tools) -> list[Recovered]:
    """Deal with every journal that was left over, what is left over in the stores they name, and points left behind.

    Raises:
        CheckpointError: something could not be put right; its journal stays. All the rest was.
    """
    done, unread = _dealt_with(tools, None)
    for one in done:
        if one.fault is not None:
            raise one.fault
    if unread is not None:
        raise unread
    return done


def prepare(tools: Tools, store: str, name: str) -> tuple[list[Recovered], CheckpointError | None]:
    """The same for a command that is to begin, which what is stuck does not keep from another snapshot.

    What was found to be stuck before, with processes that are still there, is not tried again: that may take minutes.

    Args:
        tools: see there.
        store: path of the store of the command's snapshot.
        name: of that snapshot.

    Returns:
        What was found, and why a journal can't be read, of which nothing is known.

    Raises:
        RetryError: what is stuck is of this snapshot.
        CheckpointError: journals can't be looked for.
    """
    return _dealt_with(tools, (store, name))


def _dealt_with(tools: Tools, mine: tuple[str, str] | None) -> tuple[list[Recovered], CheckpointError | None]:
    """See `recover`, without the snapshot of a command that is to begin, and `prepare`, with it."""
    done: list[Recovered] = []
    stores = set()
    stuck: CheckpointError | None = None
    unread: CheckpointError | None = None
    try:
        for path, entry in journal.left_over():
            stores.add(entry.store)
            fault: CheckpointError | None = None
            outcome = "stuck"
            try:
                if entry.stuck and mine is not None and _is_anyone_there(entry):
                    raise CheckpointError(entry.stuck, mend=_AGAIN)
                outcome = _create(entry, tools) if entry.kind == "create" else _restore(entry)
            except CheckpointError as e:
                fault = e
                if not entry.stuck:
                    journal.note_stuck(path, entry, e)
                stuck = e if (entry.store, entry.name) == mine else stuck
            else:
                journal.finish(path)
            done.append(Recovered(kind=entry.kind, name=entry.name, step=entry.step, outcome=outcome, fault=fault))
    except CorruptError:
        raise
    except CheckpointError as e:
        unread = e
    for store in sorted(stores):
        Store(store).recover()
    points.sweep()
    if stuck is not None:
        raise RetryError(f"an earlier command of this snapshot is stuck: {stuck}", mend=stuck.mend or _AGAIN)
    return done, unread


def _is_anyone_there(entry: Entry) -> bool:
    """Whether one of its processes is; of a restore that has told of none, nobody can say."""
    return not entry.tree or any(is_there(pid, since) for pid, since in entry.tree)


def _restore(entry: Entry) -> str:
    from checkpoint import restoration  # each command asks, and there is hardly ever anything to do

    restoration.undo(entry, later=True)
    return "undone"


def _create(entry: Entry, tools: Tools) -> str:
    from checkpoint import creation, criu

    if entry.images:
        criu.wait_for(entry.images, _CRIU_S)
    if entry.step == "finishing" or creation.published(entry) is not None:
        creation.finish(entry, tools)
        return "completed"
    creation.undo(entry, tools)
    return "undone"
