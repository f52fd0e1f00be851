"""The order in which a model's tensors are needed, told from their names. Pure.

Within each part of a model: embedding, blocks ascending, final norm, head, and last what no name explains. Parts come
in the order data takes through them: towers that see or hear, the encoder, the rest. Tensors of one place keep the
order of the file, so a model whose names say nothing is read from its beginning to its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from weightfs.formats.layout import Role, TensorExtent

_TOWER: Final = re.compile(
    r"(?:^|\.)(?:vision|visual|image|audio|mm|v|a|multi_modal|vit|perceiver|resampler)"
    r"(?:_?(?:model|tower|encoder|transformer|projector|projection|proj|embedder|language_projection))?\."
)
_ENCODER: Final = re.compile(r"(?:^|\.)(?:encoder|enc|down_blocks|input_blocks)\.")
_DECODER: Final = re.compile(r"(?:^|\.)(?:decoder|dec)\.")
_PARTS: Final = ("tower", "encoder", "")
_ENDS: Final = {Role.EMBEDDING: -1, Role.NORM: 1 << 40, Role.HEAD: 1 << 41, Role.OTHER: 1 << 42}

Place = tuple[int, int]
"""Part and stage: the smaller, the earlier."""


def places(tensors: Iterable[TensorExtent]) -> list[tuple[Place, str]]:
    """Where each tensor stands in the order, and what its layer is called.

    Returns:
        One (place, label) a tensor, in the order given. A label is `embedding`, `norm`, `head`, `other` or a block's
        number, behind the part's name and a dot where a model has several parts: `tower.3`, `encoder.embedding`.
    """
    listed = list(tensors)
    parts = [_part(tensor.name) for tensor in listed]
    both = any(_DECODER.search(tensor.name) for tensor in listed)
    # An encoder alone (BERT), or a U-Net's, is the model; only beside a decoder is it a part of its own.
    parts = [2 if part == 1 and not both else part for part in parts]
    several = len(set(parts)) > 1
    found = []
    for tensor, part in zip(listed, parts, strict=True):
        block = tensor.role is Role.BLOCK and tensor.layer is not None
        stage = tensor.layer if block and tensor.layer is not None else _ENDS.get(tensor.role, _ENDS[Role.OTHER])
        label = str(stage) if block else tensor.role.value
        if several and _PARTS[part]:
            label = f"{_PARTS[part]}.{label}"
        found.append(((part, stage), label))
    return found


def _part(name: str) -> int:
    if _TOWER.search(name):
        return 0
    return 1 if _ENCODER.search(name) and not _DECODER.search(name) else 2
