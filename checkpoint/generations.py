"""Which generation of each snapshot was seen last on this machine: an older one that comes back is refused.

Whoever can write a store can put an older snapshot, authentic as it is, in place of a newer one. Only somebody who
remembers the newer one can tell; a machine that never saw it can't. Generations come from the clock, but always rise.
"""

from __future__ import annotations

import contextlib
import os
import time

import blake3

from checkpoint import guarded
from checkpoint.errors import CheckpointError, CorruptError


class Generations:
    """What was seen of one store.

    Args:
        state: the folder for what outlives a command.
        digest_key: the store's, 32 bytes: what is noted says nothing of it, and a copy of a store is the same one.
    """

    def __init__(self, state: str, digest_key: bytes) -> None:
        self._folder = os.path.join(state, "generations")
        self._key = digest_key

    def next(self, name: str) -> int:
        """A generation for a new snapshot of that name; higher than any seen."""
        return max(time.time_ns(), self._seen(name) + 1)

    def require_newest(self, name: str, generation: int, path: str) -> None:
        """Refuse an older snapshot than was seen before.

        Args:
            name: of the snapshot.
            generation: its own.
            path: where it lies, for errors.

        Raises:
            CorruptError: there was a newer one.
        """
        if generation < self._seen(name):
            raise CorruptError(
                "is older than one of this name that was made or restored here before",
                path=path,
                mend=f"if it was brought back on purpose, remove {self._at(name)}",
            )

    def note(self, name: str, generation: int) -> None:
        """One was made, or is authentic and about to be restored.

        Raises:
            CheckpointError: that can't be noted.
        """
        if generation <= self._seen(name):
            return
        path = self._at(name)
        draft = f"{path}.{os.urandom(4).hex()}"
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            try:
                with open(draft, "w") as file:
                    file.write(f"{generation}\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(draft, path)
                folder = os.open(self._folder, guarded.FOLDER)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft)
                raise
        except OSError as e:
            raise guarded.unwritable(path, e) from e

    def _seen(self, name: str) -> int:
        """The highest generation seen; 0 where none was."""
        path = self._at(name)
        try:
            with open(path) as file:
                return int(file.read(32))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as e:
            raise CheckpointError(f"can't be read: {e}", path=path, mend="remove it") from e

    def _at(self, name: str) -> str:
        return os.path.join(self._folder, blake3.blake3(name.encode(), key=self._key).hexdigest(32))
