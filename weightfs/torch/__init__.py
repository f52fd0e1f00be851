"""Weights as torch tensors: drop-in for `safetensors.torch`, to a GPU at the speed of its bus, and out of its way.

Needs `weightfs[torch]`; the only room that imports torch.
"""

from __future__ import annotations

# At once, since a room has the name of what it is for: the first import of the room binds the name to the module.
from weightfs.torch.accelerate import accelerate
from weightfs.torch.loader import Blocks, load_file, load_files, load_gguf
from weightfs.torch.modules import load_model
from weightfs.torch.opened import safe_open
from weightfs.torch.parts import Shard
from weightfs.torch.released import movable, released
from weightfs.torch.stepping import Released

__all__ = [
    "Blocks",
    "Released",
    "Shard",
    "accelerate",
    "load_file",
    "load_files",
    "load_gguf",
    "load_model",
    "movable",
    "released",
    "safe_open",
]
