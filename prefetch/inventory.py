"""How much of which model is in memory, layer by layer, as the kernel says at that moment."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from prefetch.occupancy import Key, Shelf
from prefetch.plan import plan_of
from prefetch.residency import resident_of
from prefetch.standing import name_of

log = logging.getLogger(__name__)

_FRESH_S: Final = 2.0
_LOOK_S: Final = 0.25


class Inventory:
    """What is in memory of a shelf's models.

    Args:
        shelf: opens them.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._last: tuple[float, list[dict[str, Any]]] = -_FRESH_S, []
        self._looking = threading.Lock()

    def of(self, keys: Iterable[Key]) -> list[dict[str, Any]]:
        """The models named, those that can't be opened left out. Waits for the source."""
        found = []
        for key in keys:
            opened = self._shelf.open(*key)
            if opened is None:
                continue
            try:
                layers: list[dict[str, Any]] = [
                    {"layer": one.label, "bytes": one.nbytes, "resident_bytes": resident_of(one.extents, opened.fds)}
                    for one in plan_of(opened.layout, opened.sizes).layers
                ]
            finally:
                opened.close()
            total = sum(opened.sizes.values())
            found.append({"model": name_of(key), "bytes": total, "layers": layers,
                          "resident_bytes": sum(layer["resident_bytes"] for layer in layers)})  # fmt: skip
        return found

    def lately(self, keys: Callable[[], Sequence[Key]]) -> list[dict[str, Any]]:
        """The same, older than a few seconds only where the source does not answer.

        Callable from any thread, and waits a moment at most: whoever asks how a mount is must hear of it even then.
        """
        at_s, _ = self._last
        if time.monotonic() - at_s >= _FRESH_S and self._looking.acquire(blocking=False):
            looked = threading.Event()
            threading.Thread(target=self._look, args=(keys, looked), name="residency", daemon=True).start()
            looked.wait(_LOOK_S)
        return self._last[1]

    def _look(self, keys: Callable[[], Sequence[Key]], looked: threading.Event) -> None:
        try:
            self._last = time.monotonic(), self.of(keys())
        except OSError as e:
            log.debug("residency is not known: %s", e.strerror)
        finally:
            self._looking.release()
            looked.set()
