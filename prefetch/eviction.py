"""What leaves memory when it is needed for something else: whole models, the least recently wanted first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A model in memory.

    Attributes:
        key: names it.
        nbytes: how much of it is resident, and would be free without it.
        last_wanted_s: when it was last opened or asked for, on any clock that is the same for all.
        in_use: some process has one of its files open or mapped.
        pinned: some of it is locked.
    """

    key: str
    nbytes: int
    last_wanted_s: float
    in_use: bool = False
    pinned: bool = False


def choose(models: Iterable[Resident], need_bytes: int) -> list[Resident]:
    """The models to evict for `need_bytes`, in that order: no more than it takes, and never one in use or pinned.

    They may free less than is needed, when no others can go. Of two wanted at one moment the larger goes first.
    """
    idle = [model for model in models if model.nbytes > 0 and not model.in_use and not model.pinned]
    chosen: list[Resident] = []
    freed = 0
    for model in sorted(idle, key=lambda model: (model.last_wanted_s, -model.nbytes, model.key)):
        if freed >= need_bytes:
            break
        chosen.append(model)
        freed += model.nbytes
    return chosen
