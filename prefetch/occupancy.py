"""What prefetch holds in memory: room is made within the budget, pressure empties it, and some layers are locked.

Models that were wanted are known by name only; each is opened and measured when room is needed, so what is said of it
is what the kernel says at that moment. All of it blocks: for worker threads.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from prefetch.eviction import Resident, choose
from prefetch.pins import Pins
from prefetch.plan import Plan
from prefetch.residency import drop, resident_bytes
from prefetch.usage import files_in_use
from weightfs.errors import WeightfsError
from weightfs.formats.layout import WeightLayout

log = logging.getLogger(__name__)

Key = tuple[bytes, str]
"""Folder and set."""


class OpenedModel(Protocol):
    """A set of weights with its files open: see `weightfs.catalogue.OpenModel`."""

    folder: bytes
    name: str
    layout: WeightLayout
    fds: dict[str, int]
    sizes: dict[str, int]
    keys: set[tuple[int, int]]

    def close(self) -> None:
        """Close the descriptors."""


class Shelf(Protocol):
    """Finds and opens models; all of it may wait for the source. See `weightfs.catalogue.Catalogue`."""

    def names(self, path: bytes) -> list[Key]:
        """The models a path speaks of."""

    def open(self, folder: bytes, name: str) -> OpenedModel | None:
        """One of them."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that was wanted.

    Attributes:
        key: folder and set.
        wanted_s: when last.
        reserved_bytes: of its plan while it is being read, else 0.
    """

    key: Key
    wanted_s: float
    reserved_bytes: int


class Occupancy:
    """The memory of one mount's models.

    Args:
        shelf: opens them.
        budget_bytes: what they may take together.
        pinned: labels of the layers that are locked once they were read.
    """

    def __init__(self, shelf: Shelf, budget_bytes: int, pinned: Collection[str]) -> None:
        self._shelf = shelf
        self.budget_bytes = budget_bytes
        self._pinned = frozenset(pinned)
        self._pins = Pins()
        self._one = threading.Lock()
        self.evicted_bytes = 0
        self.pin_failure: str | None = None

    def make_room(self, need_bytes: int, models: Iterable[Wanted]) -> int:
        """Evict until `need_bytes` fit into the budget beside what stays; gives the bytes that are left for them.

        Args:
            need_bytes: of the model to come; more than anything can hold: evict all that nobody uses.
            models: the others. One that is being read counts as what it will be, and stays.
        """
        with self._one, contextlib.ExitStack() as stack:
            opened: dict[str, OpenedModel] = {}
            wanted: dict[str, Wanted] = {}
            for one in models:
                try:
                    model = self._shelf.open(*one.key)
                except OSError as e:
                    log.debug("can't measure %s: %s", one.key, e)
                    continue
                if model is not None:
                    stack.callback(model.close)
                    opened[repr(one.key)], wanted[repr(one.key)] = model, one
            held = {name: max(wanted[name].reserved_bytes, resident_of_model(model)) for name, model in opened.items()}
            excess = sum(held.values()) + need_bytes - self.budget_bytes
            if excess <= 0:
                return need_bytes
            usage = files_in_use({key for model in opened.values() for key in model.keys})
            pinned = self._pins.keys()
            choice = choose(
                (
                    Resident(
                        key=name,
                        nbytes=held[name],
                        last_wanted_s=wanted[name].wanted_s,
                        in_use=wanted[name].reserved_bytes > 0 or bool(model.keys & usage.in_use),
                        pinned=name in pinned,
                    )
                    for name, model in opened.items()
                ),
                excess,
            )
            for chosen in choice:
                freed = chosen.nbytes - drop_model(opened[chosen.key])
                held[chosen.key] -= freed
                self.evicted_bytes += freed
                log.info("evicted %s: %d bytes", chosen.key, freed)
            return max(0, min(need_bytes, self.budget_bytes - sum(held.values())))

    def pin(self, key: Key, plan: Plan, opened: OpenedModel) -> None:
        """Lock the layers that are to be locked; a failure is logged and kept for the status."""
        name, locked = repr(key), self._pins.keys()
        if not self._pinned or name in locked:
            return
        for file, fd in opened.fds.items():
            parts = [
                (extent.offset, extent.nbytes)
                for layer in plan.layers
                if layer.label in self._pinned
                for extent in layer.extents
                if extent.file == file
            ]
            try:
                if parts:
                    self._pins.pin(name, fd, parts)
            except (OSError, WeightfsError) as e:
                self.pin_failure = str(e)
                log.warning("can't lock layers of %s: %s", name, e)
                self._pins.release(name)
                return

    def release(self, key: Key) -> None:
        """Unlock what is locked of a model."""
        self._pins.release(repr(key))

    def status(self) -> dict[str, Any]:
        """The live state. Callable from any thread."""
        return {
            "budget_bytes": self.budget_bytes,
            "evicted_bytes": self.evicted_bytes,
            "locked_bytes": self._pins.total_bytes,
            "lock_failure": self.pin_failure,
        }


def resident_of_model(opened: OpenedModel) -> int:
    """Bytes of a model's files that are in memory."""
    return sum(resident_bytes(fd, 0, opened.sizes[file]) for file, fd in opened.fds.items())


def drop_model(opened: OpenedModel) -> int:
    """Drop a model's files from memory; gives the bytes that stay."""
    for fd in opened.fds.values():
        drop(fd)
    return resident_of_model(opened)
