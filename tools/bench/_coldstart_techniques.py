"""The techniques of the cold-start table, and its rows. Pure.

A row is a technique in a state, as `mount cold`. Cold: nothing is in memory, neither weights nor images nor Python's
libraries, which mincore(2) confirms of the files that matter; the mount's daemon runs. Warm: everything is that can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

State = Literal["cold", "warm"]
Source = Literal["model", "still", "mount"]
PLAIN: Final = "_plain_server.py"
RELEASED: Final = "_released_server.py"
IMPORTED: Final = "_imported_server.py"


@dataclass(frozen=True, kw_only=True)
class Technique:
    """One line of the table.

    Attributes:
        name: in rows and options.
        label: what readers of the table see.
        states: in which it is measured.
        source: where the server finds its weights: in the bare folder, or on a mount, which may read ahead (`mount`)
            or not (`still`).
        server: the script.
        beside: what is started with the process: `fill` reads the bare folder's weights, `warm` asks the mount to.
        snapshot: how its snapshot is made; None where it needs none. Techniques with equal ones share it.
        restore: further options of `weightfs snapshot restore`.
        in_place: GPU memory goes to the host's and back in a process that stays.
    """

    name: str
    label: str
    states: tuple[State, ...] = ("cold", "warm")
    source: Source = "model"
    server: str = PLAIN
    beside: Literal["fill", "warm"] | None = None
    snapshot: tuple[str, ...] | None = None
    restore: tuple[str, ...] = ()
    in_place: bool = False

    @property
    def stored_as(self) -> str:
        """The folder of its snapshot, below that of all."""
        return "-".join([self.server.strip("_").removesuffix(".py"), self.source, *(self.snapshot or ())])

    @property
    def is_made_by_command(self) -> bool:
        """Whether the server says itself when it is to be snapshotted."""
        return self.server != PLAIN


OPEN: Final = ("--no-encrypt",)
_IMAGES: Final = ("--no-encrypt", "--plain")
_ALONE: Final = ("--plain",)
TECHNIQUES: Final = (
    Technique(name="none", label="nothing: the bare folder"),
    Technique(name="prefetch", label="prefetch only, of the bare folder", states=("cold",), beside="fill"),
    Technique(name="mount", label="mount only (--prefetch off)", source="still"),
    Technique(name="mount+prefetch", label="mount + prefetch", source="mount"),
    Technique(name="mount+warm", label="mount + weightfs warm", source="mount", states=("cold",), beside="warm"),
    Technique(
        name="process",
        label="process C/R only, weights loaded",
        server=IMPORTED,
        snapshot=_IMAGES,
        restore=_ALONE,
    ),
    Technique(name="suspend", label="CUDA checkpoint in place", states=("warm",), source="mount", in_place=True),
    Technique(name="restore criu", label="C/R + CUDA, CRIU alone", source="mount", snapshot=_IMAGES, restore=_ALONE),
    Technique(name="restore plain", label="C/R + CUDA, page server", source="mount", snapshot=_IMAGES),
    Technique(name="restore unencrypted", label="C/R + CUDA, deduplicated", source="mount", snapshot=OPEN),
    Technique(name="restore", label="C/R + CUDA, deduplicated, encrypted", source="mount", snapshot=()),
    Technique(
        name="released criu",
        label="released weights, CRIU alone",
        source="mount",
        server=RELEASED,
        snapshot=_IMAGES,
        restore=_ALONE,
    ),
    Technique(
        name="released plain",
        label="all: released weights, page server",
        source="mount",
        server=RELEASED,
        snapshot=_IMAGES,
    ),
    Technique(name="released", label="all, deduplicated, encrypted", source="mount", server=RELEASED, snapshot=()),
)
BY_NAME: Final = {one.name: one for one in TECHNIQUES}
ROWS: Final = tuple(f"{one.name} {state}" for one in TECHNIQUES for state in one.states)


def chosen(text: str) -> list[str]:
    """The rows that an option names: rows, or techniques, which stand for all their rows; separated by commas.

    Raises:
        ValueError: there is no such row.
    """
    found: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name in BY_NAME:
            found += [f"{name} {state}" for state in BY_NAME[name].states]
        elif name in ROWS:
            found.append(name)
        else:
            raise ValueError(name)
    return list(dict.fromkeys(found))


def split(row: str) -> tuple[Technique, State]:
    """The technique and the state of a row."""
    name, _, state = row.rpartition(" ")
    return BY_NAME[name], "cold" if state == "cold" else "warm"
