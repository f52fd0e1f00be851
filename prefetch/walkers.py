"""Who goes through the library instead of loading from it: backups, copies, searches."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from typing import Final

WINDOW_S: Final = 10.0
MODELS: Final = 3
"""A process that opens more models than this within the window loads none of them."""
PIPELINE: Final = b"model_index.json"
_PROCESSES: Final = 1024
COPIERS: Final = frozenset(
    {"borg", "cat", "cp", "dd", "duplicity", "find", "grep", "kopia", "md5sum", "rclone", "restic", "rg", "rsync",
     "scp", "sha256sum", "b3sum", "tar", "updatedb", "zip"}
)  # fmt: skip
"""Programs that read files whole, in their own order: what they read is in memory soon enough, and seldom wanted."""


class Walkers:
    """Processes and the models each opened of late."""

    def __init__(self) -> None:
        self._pipelines: OrderedDict[bytes, None] = OrderedDict()
        self._opened: OrderedDict[int, dict[bytes, float]] = OrderedDict()

    def is_walking(self, process: int, path: bytes, now_s: float) -> bool:
        """Note that a process opened a file of a model; whether it goes through the library.

        A model has a folder, but for diffusers' pipelines: what lies in folders beside a `model_index.json` is one.
        """
        folder, name = os.path.split(path)
        if name == PIPELINE:
            self._pipelines[folder] = None
            self._pipelines.move_to_end(folder)
            if len(self._pipelines) > _PROCESSES:
                self._pipelines.popitem(last=False)
        if (above := os.path.dirname(folder)) in self._pipelines:
            folder = above
        models = self._opened.setdefault(process, {})
        self._opened.move_to_end(process)
        if len(self._opened) > _PROCESSES:
            self._opened.popitem(last=False)
        models[folder] = now_s
        for old in [model for model, at_s in models.items() if now_s - at_s > WINDOW_S]:
            del models[old]
        return len(models) > MODELS


def process_of(thread: int) -> tuple[int, str]:
    """The process that a thread belongs to, and its program's name; (thread, "") once it has ended."""
    tgid, name = thread, ""
    with (
        contextlib.suppress(OSError, ValueError),
        open(f"/proc/{thread}/status", encoding="utf-8", errors="replace") as status,
    ):
        for line in status:
            key, _, value = line.partition(":")
            if key == "Name":
                name = value.strip()
            elif key == "Tgid":
                tgid = int(value)
                break
    return tgid, name
