"""What happened while a model was loaded, remembered for whoever asks afterwards. Pure: it has no clock of its own.

Every `at_s` is seconds of one clock that never goes back, whose zero the caller chose. Any thread may call.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

SCHEMA: Final = 1
LOADS: Final = 64
SAMPLES: Final = 600
"""Of one load. Even: one more than that pairs up behind the first."""
OPENS: Final = 256
"""Of one load; a loader opens a dozen files, a test runner that walks the folder may open thousands."""
_DIGITS: Final = 6


@dataclass(slots=True)
class _Sample:
    """Layers whose resident bytes are others than one sample before: index -> bytes."""

    at_s: float
    changed: dict[int, int]


class Load:
    """One load of one model; made by `Timeline.begin`. What is told twice counts once: the first time."""

    def __init__(
        self,
        lock: threading.Lock,
        model: str,
        trigger: str,
        at_s: float,
        started: str,
        layers: Sequence[tuple[str, int]],
    ) -> None:
        self._lock = lock
        self._model = model
        self._trigger = trigger
        self._at_s = at_s
        self._started = started
        self._layers = tuple(layers)
        self._current = [0] * len(self._layers)
        self._samples: list[_Sample] = []
        self._gap_s = 0.0
        self._opens: list[tuple[float, str]] = []
        self._opens_left_out = 0
        self._submitted_s: float | None = None
        self._demand_wait: tuple[float, float] | None = None
        self._finished_s: float | None = None
        self._outcome: str | None = None

    def sample(self, at_s: float, resident_bytes: Sequence[int]) -> None:
        """Note how many bytes of each layer are in memory.

        Raises:
            ValueError: as many numbers as there are layers are needed.
        """
        if len(resident_bytes) != len(self._layers):
            raise ValueError(f"{len(resident_bytes)} numbers for {len(self._layers)} layers")
        with self._lock:
            pairs = zip(self._current, resident_bytes, strict=True)
            changed = {number: now for number, (before, now) in enumerate(pairs) if now != before}
            self._current = list(resident_bytes)
            known = self._samples
            if len(known) > 1 and at_s - known[-2].at_s < self._gap_s:
                known[-1] = _Sample(at_s, {**known[-1].changed, **changed})
                return
            known.append(_Sample(at_s, changed))
            if len(known) > SAMPLES:
                self._thin()

    def opened(self, at_s: float, file: str) -> None:
        """Note that a file of the model was opened; the first `OPENS` are kept, the others counted."""
        with self._lock:
            if len(self._opens) < OPENS:
                self._opens.append((at_s, file))
            else:
                self._opens_left_out += 1

    def submitted(self, at_s: float) -> None:
        """Note that the first read was handed to the kernel."""
        with self._lock:
            self._submitted_s = at_s if self._submitted_s is None else self._submitted_s

    def first_demand_wait(self, at_s: float, waited_s: float) -> None:
        """Note that a reader waited for bytes; under passthrough nobody can know, and this is never called."""
        with self._lock:
            self._demand_wait = (at_s, waited_s) if self._demand_wait is None else self._demand_wait

    def finished(self, at_s: float, outcome: str) -> None:
        """Note that reading ahead has ended, and how."""
        with self._lock:
            if self._finished_s is None:
                self._finished_s, self._outcome = at_s, outcome

    def _thin(self) -> None:
        """Drop every other sample; from now on they are as far apart as those that are left."""
        every = self._samples
        kept = [every[0]]
        for first, second in zip(every[1::2], every[2::2], strict=True):
            kept.append(_Sample(second.at_s, {**first.changed, **second.changed}))
        self._samples = kept
        self._gap_s = (every[-1].at_s - every[0].at_s) / len(kept)

    def _document(self) -> dict[str, Any]:
        """Needs the lock."""
        wait = self._demand_wait
        return {
            "model": self._model,
            "trigger": self._trigger,
            "started": self._started,
            "layers": [{"label": label, "bytes": nbytes} for label, nbytes in self._layers],
            "samples": [{"at_s": self._since(one.at_s), "changed": list(one.changed.items())} for one in self._samples],
            "opens": [{"at_s": self._since(at_s), "file": file} for at_s, file in self._opens],
            "opens_left_out": self._opens_left_out,
            "submitted_s": self._since(self._submitted_s),
            "first_demand_wait": None if wait is None else {"at_s": self._since(wait[0]), "waited_s": wait[1]},
            "finished_s": self._since(self._finished_s),
            "outcome": self._outcome,
        }

    def _since(self, at_s: float | None) -> float | None:
        return None if at_s is None else round(at_s - self._at_s, _DIGITS)


class Timeline:
    """The last `LOADS` loads of a mount.

    Args:
        unix_at_zero_s: Unix time when the caller's clock stood at zero, as `time.time() - time.monotonic()`.
    """

    def __init__(self, unix_at_zero_s: float) -> None:
        self._unix_at_zero_s = unix_at_zero_s
        self._lock = threading.Lock()
        self._loads: deque[Load] = deque(maxlen=LOADS)

    def begin(self, model: str, trigger: str, at_s: float, layers: Sequence[tuple[str, int]]) -> Load:
        """Note that a model was wanted.

        Args:
            model: its name as users know it.
            trigger: what wanted it: a file's name, or `warm`.
            at_s: when.
            layers: label and bytes of each, in the order of the plan.
        """
        started = datetime.fromtimestamp(self._unix_at_zero_s + at_s, UTC).isoformat(timespec="milliseconds")
        load = Load(self._lock, model, trigger, at_s, started, layers)
        with self._lock:
            self._loads.append(load)
        return load

    def document(self) -> dict[str, Any]:
        """All of it, oldest first, ready for JSON.

        Times are seconds since the load's trigger; `started` is UTC in ISO 8601. A sample carries the layers whose
        resident bytes changed since the one before, as [index, bytes]; before the first one all are 0. What was not
        observed is None.
        """
        with self._lock:
            return {"schema": SCHEMA, "loads": [load._document() for load in self._loads]}
