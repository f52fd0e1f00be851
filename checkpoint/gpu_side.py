"""CUDA's part of a restore: what it asks the driver beside other things, and the way back of GPU memory.

GPU memory comes back once host memory is all there. To have both at once, of the tree nothing but the driver's own
restore thread was let run, every other thread traced: with driver 580 on an H100 that restore never came to its end.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from checkpoint.destination import require_gpus
from checkpoint.phases import Phases

if TYPE_CHECKING:
    from typing import Self

    from checkpoint.cuda import Pair
    from checkpoint.cuda_helper import Cuda
    from checkpoint.fingerprint import Difference
    from checkpoint.manifest import Manifest


class GpuSide:
    """Of one restore, as a context manager: from when it is entered the driver is asked whether the snapshot fits.

    Args:
        manifest: of the snapshot.
        cuda: the driver; None where there is none. For nobody else until `placed`.
        phases: of the restore.
    """

    def __init__(self, manifest: Manifest, cuda: Cuda | None, phases: Phases) -> None:
        self._manifest = manifest
        self._cuda = cuda
        self._phases = phases
        self._answer: tuple[tuple[Pair, ...], list[Difference]] | None = None
        self._failure: Exception | None = None
        self._asking = threading.Thread(target=self._ask, name="gpu-side", daemon=True)

    def __enter__(self) -> Self:
        self._asking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._asking.join()

    def _ask(self) -> None:
        try:
            with self._phases.beside("driver opens"):
                self._answer = require_gpus(self._manifest, self._cuda)
        except Exception as e:  # noqa: BLE001 - raised where it is waited for
            self._failure = e

    def placed(self) -> list[Difference]:
        """Wait for the driver's answer; gives what moves. Errors are those of `destination.require_gpus`."""
        self._asking.join()
        if self._failure is not None:
            raise self._failure
        assert self._answer is not None
        return self._answer[1]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """For `Cuda.restore_all`, once it is placed."""
        return self._answer[0] if self._answer is not None else ()

    def restore(self, pids: Sequence[int]) -> None:
        """Bring GPU memory back; errors are those of `Cuda.restore_all`."""
        if self._cuda is not None and pids:
            with self._phases.phase("cuda restore"):
                self._cuda.restore_all(pids, self.pairs, needed_bytes=self._manifest.gpu_bytes)
