"""A source that changes, a mount of it, and a plain model in memory of what the mount must show.

Every method makes one operation, chosen by the `Random` it is given, or none where there is nothing to choose. The
model is the promises of SEMANTICS.md: exact where the mount asks each time (`patience_s` 0), else true soon.
"""

from __future__ import annotations

import random
import time
from array import array

from tests.helpers.world_changes import Changes
from tests.helpers.world_uses import Uses


class World(Changes, Uses):
    """See the module, and `Model` for what it says of itself."""

    def do(self, operation: str, chosen: random.Random) -> None:
        """Make an operation, one of `CHANGES` or `USES`."""
        started = time.perf_counter()
        getattr(self, operation)(chosen)
        self.latencies.setdefault(operation, array("d")).append(time.perf_counter() - started)
