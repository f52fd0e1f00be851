"""weightfs for programs that use torch; the only room that imports it.

    from weightfs.torch import released

Names are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from weightfs.torch.released import movable as movable
    from weightfs.torch.released import released as released
    from weightfs.torch.stepping import Released as Released

_HOMES: Final = {"Released": "stepping", "movable": "released", "released": "released"}

__all__ = ["Released", "movable", "released"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
