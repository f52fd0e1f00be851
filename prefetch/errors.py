"""What prefetch raises on purpose, beside what weightfs.errors has for it.

    WeightfsError
    ├── StagingError               exit 1   the GPU's driver refused or failed
    │   └── CopyCancelledError     exit 1   whoever asked for the copy called it off
    └── NoDeviceError              exit 3   this machine has no GPU that can be used, or no package to use it by

A file that ends too soon is weightfs.errors.ShortReadError, one that changes meanwhile IntegrityError.
"""

from __future__ import annotations

from weightfs.errors import UnfitError, WeightfsError


class StagingError(WeightfsError):
    """The GPU's driver refused or failed.

    Args:
        message: which call, and what the driver said.
        mend: what the user can do about it, if known.
        number: the driver's code (CUresult), 0 where it is not the driver that failed.
    """

    code = "staging"

    def __init__(self, message: str, *, mend: str | None = None, number: int = 0) -> None:
        super().__init__(message, mend=mend)
        self.number = number


class CopyCancelledError(StagingError):
    """Whoever asked for the copy called it off; what it should have filled holds some of it."""

    code = "cancelled"


class NoDeviceError(UnfitError):
    """No GPU can be used from this process."""

    code = "no-device"
