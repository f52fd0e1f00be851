"""Which snapshots to remove. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A snapshot that is in the store.

    Attributes:
        name: of the snapshot.
        created_ns: since the epoch.
        nbytes: what it takes on the disk.
    """

    name: str
    created_ns: int
    nbytes: int


def choose(
    snapshots: Iterable[Kept],
    *,
    keep_last: int | None = None,
    older_than_s: float | None = None,
    max_bytes: int | None = None,
    now_ns: int,
) -> tuple[str, ...]:
    """The names of those to remove, the oldest first; of two of one age the first by name counts as the older.

    Args:
        snapshots: all there are, no name twice.
        keep_last: this many of the newest stay, whatever else is asked for; of the others those go that the other two
            ask for, or all when neither is given.
        older_than_s: those made more than so many seconds ago go.
        max_bytes: of what stays, the oldest go until it is this much or less.
        now_ns: since the epoch. What was made later, by a clock since set back, is no seconds old.
    """
    oldest_first = sorted(snapshots, key=lambda one: (one.created_ns, one.name))
    may_go = oldest_first[: max(0, len(oldest_first) - (keep_last or 0))]
    if older_than_s is None and max_bytes is None:
        return tuple(one.name for one in may_go) if keep_last is not None else ()
    chosen = []
    left_bytes = sum(one.nbytes for one in oldest_first)
    for one in may_go:
        too_old = older_than_s is not None and now_ns - one.created_ns > older_than_s * 10**9
        too_much = max_bytes is not None and left_bytes > max_bytes
        if too_old or too_much:
            chosen.append(one.name)
            left_bytes -= one.nbytes
    return tuple(chosen)
