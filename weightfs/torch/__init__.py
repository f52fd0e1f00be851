"""weightfs for programs that use torch; the only room that imports it.

from weightfs.torch import movable, released
"""

from __future__ import annotations

# At once, since a room has the name of what it is for: the first import of the room binds the name to the module.
from weightfs.torch.released import movable, released
from weightfs.torch.stepping import Released

__all__ = ["Released", "movable", "released"]
