"""The files of an index, without what is in them.

index.lmdb              the index, with LMDB's own index.lmdb-lock
index.lmdb.clean        its fingerprint when it was closed; there only while nobody has it open
index.lmdb.epoch        the last epoch: outlives an index that can't be read any more
index.lmdb.unusable-N   the last one that was set aside
"""

from __future__ import annotations

import contextlib
import os
import time


class IndexFiles:
    """The files of the index in one folder.

    Attributes:
        folder: that folder.
        path: of the index itself.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.path = os.path.join(folder, "index.lmdb")
        self._epoch = self.path + ".epoch"
        self._marker = self.path + ".clean"

    def put_aside(self) -> str:
        """Rename the index, so that a new one can begin; gives its new path.

        Raises:
            OSError: it could not be renamed.
        """
        aside = f"{self.path}.unusable-{time.time_ns()}"
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, aside)
        for leftover in (self.path + "-lock", self._marker):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leftover)
        return aside

    def drop_older(self, aside: str) -> None:
        """One that was set aside is kept, for whoever wants to know; more would fill the disk.

        Raises:
            OSError: an older one could not be removed.
        """
        prefix = os.path.basename(self.path) + ".unusable-"
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            if name.startswith(prefix) and path != aside:
                os.unlink(path)

    # The epoch

    def last_epoch(self) -> int:
        """The epoch of the index that was here before, also when that is unreadable or the clock went back."""
        try:
            with open(self._epoch) as file:
                return int(file.read(20))
        except (OSError, ValueError):
            return 0

    def note_epoch(self, epoch: int) -> None:
        """This is the index's epoch now; on disk when it returns.

        Raises:
            OSError: it could not be written.
        """
        if self.last_epoch() != epoch:
            fresh = self._epoch + ".new"
            with open(fresh, "w") as file:
                file.write(str(epoch))
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self._epoch)

    # The mark of a clean end

    def is_clean(self) -> bool:
        """Whether the index is as it was when it was closed.

        Raises:
            OSError: there is none.
        """
        fingerprint = self._fingerprint()
        try:
            with open(self._marker) as marker:
                return marker.read() == fingerprint
        except OSError:
            return False  # no marker: killed, or the power went

    def mark_clean(self) -> None:
        """The index is closed, and everything is in it."""
        with contextlib.suppress(OSError), open(self._marker, "w") as marker:
            marker.write(self._fingerprint())

    def mark_open(self) -> None:
        """The index may change from now on."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._marker)

    def _fingerprint(self) -> str:
        stat = os.stat(self.path)
        return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"
