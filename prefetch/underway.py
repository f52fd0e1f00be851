"""What is being read at this moment: how much of each layer there is, where its loader is, and what stands still.

Asking the kernel how much of a range is in memory takes as long as the range has pages. A layer that was all there is
therefore asked about again once a second only: 20 times a second it was a tenth of the processor's time of a prefetch.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from prefetch.course import Lookout
from prefetch.filler import Fill
from prefetch.glances import glance
from prefetch.occupancy import OpenedModel
from prefetch.plan import Extent
from prefetch.residency import resident_bytes, resident_of
from prefetch.standing import Standing

log = logging.getLogger(__name__)

STALLED_S: Final = 30.0
"""A model of which no byte came for so long is given up."""
_AFRESH_S: Final = 1.0


@dataclass(eq=False, slots=True)
class _Model:
    opened: OpenedModel
    found: list[int] = field(default_factory=list)  # bytes of each layer, when it was asked about last
    afresh_s: float = 0.0  # when all layers were asked about
    lookout: Lookout | None = None
    done_bytes: int = -1
    done_s: float = 0.0  # since when it is so many


class Underway:
    """The models that are being read, each with its files open. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[Standing, _Model] = {}

    def __iter__(self) -> Iterator[Standing]:
        return iter(list(self._models))

    def __bool__(self) -> bool:
        return bool(self._models)

    def add(self, standing: Standing, opened: OpenedModel) -> None:
        """One more, whose files stay open until `remove`."""
        with self._lock:
            self._models[standing] = _Model(opened)

    def remove(self, standing: Standing) -> None:
        """Close its files. Waits for a measurement that is under way, and so for the source."""
        with self._lock:
            self._models.pop(standing).opened.close()

    def measure(self, which: Callable[[Standing], bool] = lambda one: True, *, afresh: bool = False) -> None:
        """Tell the timelines of some how much of each layer there is.

        Args:
            which: those; all of them unless told.
            afresh: ask about layers, too, that were all there a moment ago.
        """
        with self._lock:
            for standing, model in self._models.items():
                if which(standing):
                    self._measure(standing, model, time.monotonic(), afresh)

    def _measure(self, standing: Standing, model: _Model, now: float, afresh: bool) -> None:
        layers, fill = standing.plan.layers, standing.fill
        if afresh or not model.found or now - model.afresh_s >= _AFRESH_S:
            model.found, model.afresh_s = [0] * len(layers), now
        try:
            for number, layer in enumerate(layers):
                if model.found[number] < layer.nbytes:
                    model.found[number] = resident_of(layer.extents, model.opened.fds)
        except OSError as e:
            log.debug("can't measure %s: %s", standing.name, e.strerror)
            model.found = []
            return
        standing.load.sample(time.monotonic(), model.found)
        if fill is not None and fill.submitted_at is not None:
            standing.load.submitted(fill.submitted_at)

    def glance(self, standing: Standing) -> None:
        """Have the first page of each tensor read of one whose loader has its weights open now."""
        with self._lock:
            if (model := self._models.get(standing)) is not None:
                glance(model.opened.layout.tensors, model.opened.fds)

    def elsewhere(self) -> list[tuple[Fill, Extent]]:
        """Fills whose loader waits for them and reads elsewhere, and where each is to go on."""
        found = []
        with self._lock:
            for standing, model in self._models.items():
                if (fill := standing.fill) is None or not fill.awaited:
                    continue
                if model.lookout is None:
                    model.lookout = Lookout(functools.partial(_resident, model.opened.fds))
                try:
                    place = model.lookout.elsewhere(fill.chunks.left())
                except OSError as e:
                    log.debug("can't look for the loader of %s: %s", standing.name, e.strerror)
                    continue
                if place is not None:
                    log.debug("the loader of %s reads %s near byte %d", standing.name, place.file, place.offset)
                    found.append((fill, place))
        return found

    def stalled(self, now: float, waits: Callable[[Standing], bool]) -> list[Standing]:
        """Those of which no byte came for `STALLED_S`, though they need not wait: their source stands still.

        Never waits itself, whatever `measure` waits for.

        Args:
            now: seconds of any clock, the same one each time.
            waits: whether a model is held up by us.
        """
        found = []
        for standing, model in list(self._models.items()):
            if (fill := standing.fill) is None or fill.cancelled:
                continue
            done = fill.filled_bytes + fill.skipped_bytes
            if done != model.done_bytes or waits(standing):
                model.done_bytes, model.done_s = done, now
            elif now - model.done_s >= STALLED_S:
                found.append(standing)
        return found


def _resident(fds: Mapping[str, int], extent: Extent) -> int:
    return resident_bytes(fds[extent.file], extent.offset, extent.nbytes)
