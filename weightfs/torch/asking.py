"""Asks the daemon of the mount that weights lie on to read them, without waiting for it: nothing depends on it.

Loading works on any path. From a mount, opening a file is a wish already; asked, the daemon also knows that all files
of the model are wanted now, in the order of their layers, before the loader has come to them.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable
from typing import Final

from weightfs import mounts
from weightfs.control import ask
from weightfs.errors import WeightfsError
from weightfs.formats.shards import group_shards

_ANSWER_S: Final = 5.0

log = logging.getLogger(__name__)


def ask_for(paths: Iterable[str]) -> threading.Thread | None:
    """Have what serves these files read them into memory, in a thread of its own.

    Args:
        paths: of files, on mounts or not.

    Returns:
        The thread; None where no file lies on a mount.
    """
    try:
        wanted = _on_mounts(paths)
    except OSError as error:
        log.debug("mounts can't be read: %s", error)
        return None
    if not wanted:
        return None
    thread = threading.Thread(target=_ask, args=(wanted,), name="weightfs-ask", daemon=True)
    thread.start()
    return thread


def _on_mounts(paths: Iterable[str]) -> dict[str, set[str]]:
    """Mountpoints, and what of each is wanted: one shard of each set, for which the daemon reads the whole set."""
    here = sorted((one.mountpoint for one in mounts.mounted()), key=len, reverse=True)
    wanted: dict[str, set[str]] = {}
    folders: dict[str, list[str]] = {}
    for path in paths if here else ():
        above, last = os.path.split(os.path.abspath(path))
        folders.setdefault(os.path.realpath(above), []).append(last)  # of a link the name, which is what is known
    firsts = [
        os.path.join(above, files[0]) for above, names in folders.items() for files in group_shards(names).values()
    ]
    for full in firsts:
        for mountpoint in here:
            if full.startswith(mountpoint.rstrip("/") + "/"):
                wanted.setdefault(mountpoint, set()).add(os.path.relpath(full, mountpoint))
                break
    return wanted


def _ask(wanted: dict[str, set[str]]) -> None:
    for mountpoint, paths in wanted.items():
        try:
            with open(os.path.join(mountpoint, ".weightfs", "status.json"), encoding="utf-8") as file:
                socket = json.load(file).get("control_socket")
            if socket is None:
                continue
            for path in sorted(paths):
                ask(socket, {"command": "warm", "path": path, "layers": None}, _ANSWER_S)
        except (OSError, ValueError, WeightfsError) as error:
            log.debug("the daemon of %s was not asked: %s", mountpoint, error)
