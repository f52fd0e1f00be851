"""How bytes of files come to a GPU: the ways, their settings, and what a copy or a probe found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Way = Literal["ring", "windows", "both"]
"""Read into buffers that are pinned already (`prefetch.ring`), pinned where they are (`prefetch.windows`), or both at
once: reading costs processors and memory bandwidth, pinning the kernel's page tables, and the bus takes the sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingConfig:
    """How much memory and how many threads a pool may take.

    Attributes:
        way: how bytes of the page cache are copied; None is whichever is faster here, see `Staging.copy`.
        threads: the most that read at once; by default 12, or three quarters of the processors where those are fewer.
        buffers: of each of them.
        buffer_bytes: of each buffer, a multiple of the page size. All of them are pinned memory: 144 MiB by default.
            Larger ones leave the processor's caches before the GPU reads them: see tools/bench/staging.py.
        window_threads: the most that pin windows of the page cache at once.
        window_bytes: of each window, a multiple of the page size.
    """

    way: Way | None = None
    threads: int | None = None
    buffers: int = 3
    buffer_bytes: int = 4 << 20
    window_threads: int = 4
    window_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a copy did.

    Attributes:
        nbytes: bytes that are on the device now.
        seconds: how long it took.
        way: how they came there, or most of them.
        threads: that took part.
        past_cache_bytes: how much was read past the page cache.
        waited_s: how long each of them waited for a buffer that the GPU still read, on average; near 0 where reading is
            what takes so long.
    """

    nbytes: int
    seconds: float
    way: Way
    threads: int
    past_cache_bytes: int
    waited_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What each way gave on this host.

    Attributes:
        bytes_per_s: by way; those that can't be taken are not there.
        refusal: why the page cache can't be pinned, None where it can.
    """

    bytes_per_s: dict[Way, float]
    refusal: str | None = None

    @property
    def way(self) -> Way:
        """The fastest one."""
        return max(self.bytes_per_s, key=self.bytes_per_s.__getitem__)
