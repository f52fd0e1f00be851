"""A model that was wanted, and how far reading it is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final

from prefetch.filler import Fill
from prefetch.occupancy import Key
from prefetch.plan import Plan
from prefetch.timeline import Load

WARM: Final = "warm"
"""The trigger of what was asked for, not opened."""
PREDICTED: Final = "predicted"
"""The trigger of what nobody asked for yet."""
GAVE_WAY: Final = "memory was short, or somebody wanted a model"
"""How reading what is predicted ends early."""


@dataclass(eq=False, slots=True)
class Standing:
    """A model that was wanted.

    Attributes:
        key: (folder, set).
        wanted_s: when last (monotonic); of one that is predicted, when it was opened last.
        trigger: what wanted it.
        process: who did, 0 for nobody in particular.
        plan: its last one, whole even where the budget let less be read.
        in_part: whether some layers only were asked for.
        fill: of that plan; None before it began.
        load: what the timeline tells of it.
    """

    key: Key
    wanted_s: float
    trigger: str
    process: int
    plan: Plan
    in_part: bool
    fill: Fill | None
    load: Load

    @property
    def name(self) -> str:
        """As users know it: folder and set."""
        return name_of(self.key)

    @property
    def is_active(self) -> bool:
        """Whether reads of it are under way, or about to be."""
        return self.fill is None or not self.fill.ended.is_set()

    @property
    def is_predicted(self) -> bool:
        """Whether nobody asked for it yet: whoever does is not to wait for this."""
        return self.trigger == PREDICTED

    @property
    def has_failed(self) -> bool:
        """Whether less than was wanted is read, and that was not the plan."""
        return self.fill is not None and self.fill.failure not in (None, GAVE_WAY)

    def document(self) -> dict[str, Any]:
        """Its progress."""
        fill = self.fill
        return {
            "model": self.name,
            "trigger": self.trigger,
            "bytes": self.plan.nbytes,
            "filled_bytes": fill.filled_bytes if fill else 0,
            "found_bytes": fill.skipped_bytes if fill else 0,
            # A read that never returns does not keep whoever waits for the model.
            "active": self.is_active and not (fill is not None and fill.cancelled),
            "failure": fill.failure if fill else None,
        }


def name_of(key: Key) -> str:
    """A model as users know it: folder and set."""
    return os.path.join(os.fsdecode(key[0]), key[1])


def key_of(name: str) -> Key:
    """The model of a name."""
    folder, one = os.path.split(name)
    return os.fsencode(folder), one
