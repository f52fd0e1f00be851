"""Every error of a checkpoint. They are weightfs's own, so that commands exit and speak alike.

WeightfsError
└── CheckpointError              exit 1    the target or the process restored could not be dealt with
    ├── TargetError              exit 1    the process can't be checkpointed as it is: carries why and what to do
    ├── CriuError                exit 1    CRIU failed; carries the end of its log
    ├── CudaError                exit 1    the driver refused; carries its code and which pid is stuck where
    ├── MasterKeyError           exit 1    the key can't be had: no such file, others may read it, a command failed
    ├── SnapshotNameError        exit 1    no snapshot of that name, or one already
    ├── MisfitError              exit 3    the snapshot does not fit this machine; carries what differs
    ├── CorruptError             exit 4    bytes of a snapshot, or weights it refers to, are not what they were
    └── RetryError               exit 75   busy, timed out, pid taken, too little free GPU memory
        └── PidTakenError        exit 75   of CRIU, which met the pid that a process of the snapshot has
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from weightfs.errors import BusyError, IntegrityError, UnfitError, WeightfsError


class CheckpointError(WeightfsError):
    """Root of this package's errors.

    Attributes:
        is_half_done: what a command had begun could be neither completed nor undone: its journal stays.
    """

    code: ClassVar[str] = "checkpoint"
    is_half_done: bool = False


class TargetError(CheckpointError):
    """The process can't be checkpointed as it is.

    Args:
        message, path, mend: see `WeightfsError`.
        findings: a document each, as `checkpoint.preflight` makes them.
    """

    code: ClassVar[str] = "target"

    def __init__(
        self, message: str, *, path: str | None = None, mend: str | None = None, findings: Sequence[dict[str, Any]] = ()
    ) -> None:
        super().__init__(message, path=path, mend=mend)
        self.findings = list(findings)


class CriuError(CheckpointError):
    """CRIU failed.

    Args:
        message, path, mend: see `WeightfsError`.
        log: the end of what it logged, for those who debug.
    """

    code: ClassVar[str] = "criu"

    def __init__(self, message: str, *, path: str | None = None, mend: str | None = None, log: str = "") -> None:
        super().__init__(message, path=path, mend=mend)
        self.log = log


class CudaError(CheckpointError):
    """The CUDA driver refused.

    Args:
        message, mend: see `WeightfsError`.
        result: the driver's code (CUresult), 0 where it gave none.
        stuck: the state in which each process is left that is not as it was found, by pid.
    """

    code: ClassVar[str] = "cuda"

    def __init__(
        self, message: str, *, mend: str | None = None, result: int = 0, stuck: dict[int, str] | None = None
    ) -> None:
        super().__init__(message, mend=mend)
        self.result = result
        self.stuck = dict(stuck or {})


class SnapshotNameError(CheckpointError):
    """No snapshot of that name, or one already."""

    code: ClassVar[str] = "name"


class MasterKeyError(CheckpointError):
    """The key that snapshots are sealed with can't be had. One that is had, but does not fit, is a CorruptError."""

    code: ClassVar[str] = "key"


class MisfitError(CheckpointError, UnfitError):
    """The snapshot does not fit this machine.

    Args:
        message, path, mend: see `WeightfsError`.
        differences: a document each: {what, snapshot, here, matters}.
    """

    exit_code = UnfitError.exit_code
    code: ClassVar[str] = "misfit"

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        mend: str | None = None,
        differences: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__(message, path=path, mend=mend)
        self.differences = list(differences)


class CorruptError(CheckpointError, IntegrityError):
    """Bytes of a snapshot, or weights it refers to, are not what they were."""

    exit_code = IntegrityError.exit_code
    code: ClassVar[str] = "corrupt"


class RetryError(CheckpointError, BusyError):
    """The command may succeed later, unchanged."""

    exit_code = BusyError.exit_code
    code: ClassVar[str] = "retry"


class PidTakenError(RetryError):
    """A pid that the restore needs belongs to another process.

    Args:
        message, mend: see `WeightfsError`.
        pid: which.
    """

    def __init__(self, message: str, *, mend: str | None = None, pid: int) -> None:
        super().__init__(message, mend=mend)
        self.pid = pid
