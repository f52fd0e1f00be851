"""Completes or undoes what commands that died have begun."""

from __future__ import annotations

from typing import Final

import msgspec

from checkpoint import journal, points
from checkpoint.errors import CheckpointError
from checkpoint.journal import Entry
from checkpoint.store import Store
from checkpoint.tools import Tools

_CRIU_S: Final = 120.0


class Recovered(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        kind: `create` or `restore`.
        name: of the snapshot.
        step: at which the command died.
        outcome: `undone` or `completed`.
    """

    kind: str
    name: str
    step: str
    outcome: str


def recover(tools: Tools) -> list[Recovered]:
    """Deal with every journal that was left over, what is left over in the stores they name, and points left behind.

    Raises:
        CheckpointError: something could not be put right; its journal stays. All the rest was.
    """
    done = []
    stores = set()
    failure: CheckpointError | None = None
    for path, entry in journal.left_over():
        stores.add(entry.store)
        try:
            outcome = _create(entry, tools) if entry.kind == "create" else _restore(entry)
        except CheckpointError as e:
            failure = failure or e
            continue
        journal.finish(path)
        done.append(Recovered(kind=entry.kind, name=entry.name, step=entry.step, outcome=outcome))
    for store in sorted(stores):
        Store(store).recover()
    points.sweep()
    if failure is not None:
        raise failure
    return done


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
