"""Where a model lies: the source that a mount shows it from, and that source's state folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from weightfs import mounts
from weightfs.cli.mounting import status_of
from weightfs.config import default_state_dir
from weightfs.errors import BusyError, WeightfsError

SCRATCH: Final = "weightfs-record-"
"""What the name of a folder begins with in which `record` keeps its private mount: that one is nobody's home."""


@dataclass(frozen=True, slots=True)
class Home:
    """A folder of a source.

    Attributes:
        source: the source's root, absolute.
        state_folder: of that source.
        folder: from the root, empty for the root itself.
    """

    source: str
    state_folder: str
    folder: str

    @property
    def path(self) -> str:
        """The folder, not through a mount."""
        return os.path.join(self.source, self.folder) if self.folder else self.source


def control_socket(here: mounts.Mounted) -> str:
    """Where the daemon of a mount listens.

    Raises:
        BusyError: the mount does not answer.
        WeightfsError: it has no control socket.
    """
    said = status_of(here)
    if said is None:
        raise BusyError("the mount does not answer", path=here.mountpoint)
    socket: str | None = said.get("control_socket")
    if socket is None:
        raise WeightfsError("the mount has no control socket", path=here.mountpoint, mend="see the daemon's log")
    return socket


def home_of(path: str) -> Home | None:
    """The home of a folder that lies on a mount, or in the source of one; None where it does neither.

    Where it lies in several, the innermost counts.

    Raises:
        BusyError: the mount does not answer.
    """
    full = os.path.realpath(path)
    found = [one for one in mounts.mounted() if f"/{SCRATCH}" not in one.mountpoint]
    for here in sorted(found, key=lambda one: -len(one.mountpoint)):
        if is_below(full, here.mountpoint):
            return _home(here, os.path.relpath(full, here.mountpoint))
    for here in sorted(found, key=lambda one: -len(one.source)):
        if is_below(full, here.source):
            return _home(here, os.path.relpath(full, here.source))
    return None


def home_below(source: str, path: str) -> Home | None:
    """The home of a folder in a source that nobody need have mounted; None where it does not lie there."""
    root, full = os.path.realpath(source), os.path.realpath(path)
    if not is_below(full, root):
        return None
    relative = os.path.relpath(full, root)
    return Home(root, default_state_dir(root), "" if relative == "." else relative)


def _home(here: mounts.Mounted, relative: str) -> Home:
    said = status_of(here)
    if said is None:
        raise BusyError("the mount does not answer", path=here.mountpoint)
    socket = said.get("control_socket")
    state_folder = os.path.dirname(socket) if socket else default_state_dir(here.source)
    return Home(here.source, state_folder, "" if relative == "." else relative)


def is_below(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
