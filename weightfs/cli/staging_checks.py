"""What `weightfs doctor` says of the way to the GPU: none of it is needed for a mount."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from prefetch.staging import NoDeviceError, Staging, StagingError, close_shared, shared
from weightfs.checks import Check

_NAMES: Final = {
    "ring": "ring: files are read into pinned buffers",
    "windows": "windows: the page cache is pinned where it is",
    "both": "both: parts are read into pinned buffers, parts are pinned where they are",
}


def checks() -> list[Check]:
    """Every check of this module."""
    return [staging()]


def staging(pool_of: Callable[[int], Staging] = shared) -> Check:
    """How weights come to the first GPU, found out by trying each way for 0.1 s."""
    try:
        rates = pool_of(0).probe()
    except NoDeviceError as e:
        return Check("staging", "missing", f"{e}: nothing to load weights onto; mounts do not need it", e.mend)
    except StagingError as e:
        return Check("staging", "degraded", f"weights can't be brought to the GPU through pinned memory: {e}", e.mend)
    finally:
        close_shared()
    found = ", ".join(f"{way} {rate / 1e9:.1f} GB/s" for way, rate in rates.bytes_per_s.items())
    why = f"; the page cache can't be pinned: {rates.refusal}" if rates.refusal else ""
    return Check("staging", "ok", f"{_NAMES[rates.way]} ({found}{why})")
