"""Other versions of weightfs: copies of the package with some lines changed, run by PYTHONPATH."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Final

import weightfs

_PACKAGE: Final = os.path.dirname(weightfs.__file__)

DYING: Final = '''"""Where a daemon is to die: at points for which there is a file in the folder."""

import os
import signal
import time

FOLDER = {folder!r}


def at(point):
    try:
        os.unlink(os.path.join(FOLDER, point))
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def always_at(point):
    if os.path.exists(os.path.join(FOLDER, point)):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
'''
_IMPORT: Final = ("import trio\n", "import trio\nfrom weightfs import dying\n")
DEATHS: Final = {
    "channel.py": [
        _IMPORT,
        ("        if opcode == Opcode.READ:\n",
         "        dying.at(f'read-{int(opcode)}')\n        if opcode == Opcode.READ:\n"),
        ("            self._handles.discard(nodeid, handle)\n            self._kernel.answer(unique, 0)\n",
         "            self._handles.discard(nodeid, handle)\n            dying.at('released')\n"
         "            self._kernel.answer(unique, 0)\n            dying.at('release-answered')\n"),
    ],
    "kernel.py": [
        ("from weightfs import wire\n", "from weightfs import dying, wire\n"),
        ("            # Mutable, so that Python",
         "            if os.path.exists(os.path.join(dying.FOLDER, 'backing-made')):\n"
         "                fcntl.ioctl(self.fd, wire.BACKING_OPEN, bytearray(wire.BACKING_MAP.pack(fd, 0, 0)))\n"
         "            dying.at('backing-made')\n            # Mutable, so that Python"),
    ],
    "opens.py": [
        ("from weightfs import wire\n", "from weightfs import dying, wire\n"),
        ("        elif not self._kernel.write([message]):\n            self._handles.discard(nodeid, handle)  #",
         "        elif dying.at('open-noted') or not self._kernel.write([message]) or dying.at('open-answered'):\n"
         "            self._handles.discard(nodeid, handle)  #"),
    ],
    "filesystem.py": [
        ("from weightfs.asking import Asking\n", "from weightfs import dying\nfrom weightfs.asking import Asking\n"),
        ("        path = os.path.join(self._tree.path(folder), name)\n        try:\n",
         "        path = os.path.join(self._tree.path(folder), name)\n        if name == b'poison':\n"
         "            dying.always_at('poison')\n        try:\n"),
    ],
    # Else the supervisor would pause between deaths that a test makes one after the other.
    "supervision/supervisor.py": [("_YOUNG_S: Final = 1.0", "_YOUNG_S: Final = 0.0")],
    "service.py": [
        _IMPORT,
        ("        after_death = self._ledger.begin()\n",
         "        after_death = self._ledger.begin()\n        dying.always_at('begin')\n"),
    ],
}  # fmt: skip
"""Edits that make a daemon die at points named by files."""


def make_version(folder: str, edits: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Copy the package to `folder` and replace text in it; gives what PYTHONPATH must be to run the copy.

    Args:
        folder: made; the copy is its one package.
        edits: by file, (text that is there exactly once, text instead of it).
    """
    copy = os.path.join(folder, "weightfs")
    shutil.copytree(_PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file, replacements in edits.items():
        path = os.path.join(copy, file)
        with open(path) as source:
            text = source.read()
        for before, after in replacements:
            assert text.count(before) == 1, f"{file} holds this {text.count(before)} times: {before}"
            text = text.replace(before, after)
        with open(path, "w") as source:
            source.write(text)
    return os.pathsep.join([folder, os.path.dirname(_PACKAGE)])


def make_mortal_version(folder: str) -> tuple[str, str]:
    """A version whose daemons die at points; gives its PYTHONPATH, and the folder whose files name the points."""
    points = os.path.join(folder, "points")
    path = make_version(os.path.join(folder, "mortal"), DEATHS)
    os.mkdir(points)
    with open(os.path.join(folder, "mortal", "weightfs", "dying.py"), "w") as module:
        module.write(DYING.format(folder=points))
    return path, points
