"""Weights as torch tensors: drop-in for `safetensors.torch`, and to a GPU at the speed of its bus.

Needs `weightfs[torch]`. What is here is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from weightfs.torch.loader import Blocks as Blocks
    from weightfs.torch.loader import load_file as load_file
    from weightfs.torch.loader import load_files as load_files
    from weightfs.torch.loader import load_gguf as load_gguf
    from weightfs.torch.modules import load_model as load_model
    from weightfs.torch.opened import safe_open as safe_open
    from weightfs.torch.parts import Shard as Shard

_ROOMS: Final = {
    "Blocks": "loader",
    "load_file": "loader",
    "load_files": "loader",
    "load_gguf": "loader",
    "load_model": "modules",
    "Shard": "parts",
    "safe_open": "opened",
}
__all__ = ["Blocks", "Shard", "load_file", "load_files", "load_gguf", "load_model", "safe_open"]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
