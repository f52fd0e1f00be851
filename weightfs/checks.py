"""What a check of `weightfs doctor` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "degraded", "missing"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: stable, for scripts.
        state: `missing` means that what it stands for can't be used at all.
        detail: what was found and what it means.
        mend: a command that helps, if there is one.
        needed: whether no mount can be served without it.
    """

    name: str
    state: State
    detail: str
    mend: str | None = None
    needed: bool = False
