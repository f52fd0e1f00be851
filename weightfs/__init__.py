"""weightfs: a read-only filesystem for model weights, at the speed of the bare file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightfs.formats import Role as Role
    from weightfs.formats import TensorExtent as TensorExtent
    from weightfs.formats import WeightLayout as WeightLayout
    from weightfs.model import open_model as open_model

__all__ = ["Role", "TensorExtent", "WeightLayout", "open_model"]


def __getattr__(name: str) -> Any:
    """What the package offers, imported when it is asked for: every command of the package imports this module."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("weightfs.model" if name == "open_model" else "weightfs.formats"), name)
