"""CUDA's part of a restore: what it asks the driver beside other things, and what it does while memory is filled in.

To bring GPU memory back takes longer than anything else of a restore, and reads the host memory that is filled in
meanwhile: what is not there yet it waits for, as any fault does. All that runs of the tree is the thread that the
driver has for this; see `checkpoint.holding`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from checkpoint import processes
from checkpoint.destination import require_gpus
from checkpoint.errors import CheckpointError, CudaError
from checkpoint.holding import Holding
from checkpoint.phases import Phases

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from checkpoint.cuda import Pair
    from checkpoint.cuda_helper import Cuda
    from checkpoint.fingerprint import Difference
    from checkpoint.manifest import Manifest


class GpuSide:
    """Of one restore, as a context manager: from when it is entered the driver is asked whether the snapshot fits.

    Left by an exception, what it holds is killed.

    Args:
        manifest: of the snapshot.
        cuda: the driver; None where there is none. For nobody else until `placed`.
        phases: of the restore.

    Attributes:
        is_restored: GPU memory is where it was; the processes are locked.
    """

    def __init__(self, manifest: Manifest, cuda: Cuda | None, phases: Phases) -> None:
        self.is_restored = False
        self._manifest = manifest
        self._cuda = cuda
        self._phases = phases
        self._answer: tuple[tuple[Pair, ...], list[Difference]] | None = None
        self._failure: Exception | None = None
        self._asking = threading.Thread(target=self._ask, name="gpu-side", daemon=True)
        self._held = contextlib.ExitStack()
        self._holding: Holding | None = None

    def __enter__(self) -> Self:
        self._asking.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, raised, trace)
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

    def restore_held(self, root: int) -> bool:
        """Bring GPU memory back while host memory is filled in; gives whether that could be done.

        Args:
            root: of the tree, which is stopped.

        Raises:
            CudaError: see `Cuda.restore_all`.
            CheckpointError: the thread of the driver has ended.
        """
        runners = self._runners()
        if not runners or self._cuda is None:
            return False
        holding = Holding([pid for pid, _ in processes.family(root)], runners)
        try:
            self._held.enter_context(holding)
        except CheckpointError:
            return False
        self._holding = holding
        holding.begin()
        self.restore(self._manifest.cuda_pids)
        holding.finish()
        return True

    def let_go(self) -> None:
        """Processes are held no more; they are to be resumed."""
        if self._holding is not None:
            self._holding.let_go()

    def restore(self, pids: Sequence[int]) -> None:
        """Bring GPU memory back, if that was not done; errors are those of `Cuda.restore_all`."""
        if self._cuda is not None and pids and not self.is_restored:
            with self._phases.phase("cuda restore"):
                self._cuda.restore_all(pids, self.pairs, needed_bytes=self._manifest.gpu_bytes)
            self.is_restored = True

    def _runners(self) -> dict[int, int]:
        """The thread of each CUDA process that must run for its restore; none where the driver does not know one."""
        if self._cuda is None:
            return {}
        found = {}
        for pid in self._manifest.cuda_pids:
            try:
                found[pid] = self._cuda.restore_thread(pid)
            except CudaError:
                return {}
            if not os.path.exists(f"/proc/{pid}/task/{found[pid]}"):
                return {}
        return found
