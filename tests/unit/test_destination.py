"""Whether there is memory for a restore."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from checkpoint.destination import require_memory
from checkpoint.errors import RetryError
from checkpoint.preflight_memory import SPARE_BYTES, available


def snapshot(nbytes: int) -> Any:
    return SimpleNamespace(bytes_logical=nbytes)


def test_a_snapshot_that_fits() -> None:
    assert available().nbytes > 2 * SPARE_BYTES
    require_memory(snapshot(1 << 20))


def test_a_snapshot_that_does_not_fit_is_refused_for_now() -> None:
    with pytest.raises(RetryError, match=f"had {1 << 40} MiB in memory, and .* MiB are free ") as raised:
        require_memory(snapshot(1 << 60))
    assert raised.value.exit_code == 75
    assert raised.value.mend
