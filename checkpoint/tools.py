"""What a snapshot is made and restored with on this machine: found once per command."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final

import msgspec

from checkpoint.criu import Criu, find_criu
from checkpoint.cuda_helper import Cuda
from checkpoint.digest_cache import DigestCache

STATE: Final = "/var/lib/weightfs"


class Tools(msgspec.Struct, frozen=True, kw_only=True):
    """See the module.

    Attributes:
        criu: the one to use.
        cuda: the GPU side; None on a machine without.
        cache: digests of files that have not changed.
        state: the folder for what outlives a command.
    """

    criu: Criu
    cuda: Cuda | None
    cache: DigestCache
    state: str


@contextlib.contextmanager
def found(state: str = STATE) -> Iterator[Tools]:
    """Find them; the GPU's helper process ends with the context.

    Raises:
        MisfitError: no CRIU that works.
        CudaError: there is a driver, but it can't be used.
    """
    criu = find_criu(check=False)
    with DigestCache(os.path.join(state, "digests.sqlite3")) as cache:
        cuda = Cuda.detect()
        try:
            yield Tools(criu=criu, cuda=cuda, cache=cache, state=state)
        finally:
            if cuda is not None:
                cuda.close()
