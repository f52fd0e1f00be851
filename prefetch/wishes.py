"""What calls for a model to be read: names that loaders open, and whether that is being read already. Pure."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from prefetch.anticipation import Target
from prefetch.standing import WARM, Standing
from weightfs.formats import format_of

AGAIN_S: Final = 1.0
"""A model whose plan began less than this ago is not planned again: a loader opens a dozen of its files."""
_TOKENIZERS: Final = ("tokenizer.", "tokenizer_config.", "vocab.", "spiece.", "sentencepiece.")
_CONFIGURATIONS: Final = frozenset({"config.json", "model_index.json", "generation_config.json", "params.json"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Why a model is to be read.

    Attributes:
        trigger: a file's name, `WARM` or `PREDICTED`.
        process: whose, 0 for nobody's in particular.
        layers: their labels; None is all.
        target: of what is predicted.
    """

    trigger: str
    process: int = 0
    layers: Collection[str] | None = None
    target: Target | None = None


def is_trigger(path: bytes) -> bool:
    """Whether a loader opens a file of that name before, or when, it loads weights."""
    name = os.fsdecode(os.path.basename(path))
    return (
        format_of(name) is not None
        or name in _CONFIGURATIONS
        or name.endswith(".index.json")
        or name.startswith(_TOKENIZERS)
    )


def is_served(known: Standing, wish: Wish, now: float) -> bool:
    """Whether what is being read, or was read just now, is what somebody asks for.

    Nobody waits for what was foretold, nor for what reads some layers only.
    """
    if wish.target is not None:
        return known.is_active
    if wish.layers is not None or known.is_predicted or known.in_part:
        return False
    return known.is_active or (wish.trigger != WARM and now - known.wanted_s < AGAIN_S)
