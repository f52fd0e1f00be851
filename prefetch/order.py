"""The order in which a model's tensors are needed, told from their names. Pure.

Within each part of a model: what stands before the blocks, blocks ascending, final norm, head, and last what no name
explains. Parts come in the order data takes through them: towers that see or hear, what joins them to the language
model, what a text conditions by, the encoder, the model itself, what decodes its output, and heads that guess further
tokens. Tensors of one place keep the order of the files, so a model whose names say nothing is read from its beginning
to its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from weightfs.formats.layout import Role, TensorExtent
from weightfs.formats.roles import BLOCK

Place = tuple[int, int]
"""Part and stage: the smaller, the earlier."""
_Found = tuple[int, int, str]
"""Part, stage, and what the layer is called within its part."""

_PARTS: Final = ("vision", "audio", "projector", "text", "", "encoder", "decoder", "vae", "mtp")
"""In the order of data. The nameless one before the encoder holds the embedding that both encoder and decoder use."""
_VISION, _AUDIO, _PROJECTOR, _TEXT, _SHARED, _ENCODER, _MODEL, _VAE, _GUESSES = range(len(_PARTS))
_PART: Final = re.compile(
    r"^(?:(v|vision)|(a)|(mm))\."
    r"|(?:^|\.)(?:"
    r"((?:multi_?modal|mm|vision|visual|image|audio|speech|vl)_?(?:language_)?(?:projector|projection|proj|adapter)"
    r"|connector|aligner|resampler|perceiver)"
    r"|(vision_[a-z_]+|visual|vit|vpm|image_(?:encoder|tower|model)|img_processor)"
    r"|(audio_[a-z_]+|apm|(?:speech|sound)_(?:encoder|tower|model))"
    r"|(cond_stage_model|conditioner|text_encoders?)"
    r"|(encoder|enc|[a-z]+_encoder)"
    r"|(decoder|dec|[a-z]+_decoder)"
    r"|(first_stage_model|vae)"
    r"|(mtp|mtp_[a-z_]+|medusa_heads?|nextn)"
    r")\."
)
"""The first component of a name, before its block's number, that says in which part a tensor is.

The names of one letter are GGUF's, at the root only: T5's attention has a `v` as well.
"""
_OF_GROUP: Final = (
    _VISION, _AUDIO, _PROJECTOR, _PROJECTOR, _VISION, _AUDIO, _TEXT, _ENCODER, _MODEL, _VAE, _GUESSES
)  # fmt: skip
_DECODER_GROUP: Final = 9
_GUESSING: Final = re.compile(r"\.(?:eh_proj|nextn)\.")
"""In a block that guesses the token after the next (DeepSeek, GLM; `blk.N.nextn` in GGUF): numbered on from the model's
last, but run after the head, if at all."""

_BEFORE_BLOCKS: Final = re.compile(
    r"(?:^|\.)(?:conv1d?|conv2d?|conv_in|conv_first|stem|pre_?lay(?:e)?r_?norm|ln_pre|pre_ln|norm_pre"
    r"|(?:img|txt|time|vector|guidance|proj|input)_in|patch_[a-z]+|[a-z]*_?embedder|time_[a-z_]+"
    r"|rotary_[a-z]+|rope_[a-z_]+|inv_freq)(?:\.|$)"
)
"""Outside of blocks, what the roles of `weightfs.formats` leave open or call a norm, and the first block needs."""
_AFTER_BLOCKS: Final = re.compile(r"^(?:.*\.)?(?:conv_out|out|final_layer|to_logits)(?:\.|$)")
_BEFORE, _NORM, _HEAD, _OTHER = -1, 1 << 60, 1 << 61, 1 << 62
_STAGES: Final = {
    Role.EMBEDDING: (_BEFORE, "embedding"),
    Role.NORM: (_NORM, "norm"),
    Role.HEAD: (_HEAD, "head"),
}
_KINDS: Final = {
    "down_blocks": (0, "down"), "input_blocks": (0, "down"), "mid_block": (1, "mid"), "middle_block": (1, "mid"),
    "up_blocks": (2, "up"), "output_blocks": (2, "up"),
    "single_blocks": (1, "single"), "single_transformer_blocks": (1, "single"),
}  # fmt: skip
"""Blocks of models whose stages each count from 0: which stage, and what its labels begin with."""


def places(tensors: Iterable[TensorExtent]) -> list[tuple[Place, str]]:
    """Where each tensor stands in the order, and what its layer is called.

    Returns:
        One (place, label) a tensor, in the order given; within a model every label is of one place.
        A label is `embedding` (with all else that comes before the blocks), a block's number, `norm`, `head` or
        `other`. It has the part's name and a dot before it where a model has several (`vision.3`,
        `encoder.embedding`; the model itself goes without), and the stage's in a U-Net (`down.0`, `mid`, `up.2`) and
        in Flux (`single.0`).
    """
    blocks: dict[str, _Found] = {}
    found: list[_Found] = []
    decodes = False
    guessing: set[_Found] = set()
    begins, ends, known = "", 0, (0, 0, "")  # the last block; its tensors mostly follow one another
    for tensor in tensors:
        name = tensor.name
        if not begins or not name.startswith(begins):
            block = BLOCK.search(name) if tensor.role is Role.BLOCK else None
            if block is None:
                part, is_decoder = _part(name)
                decodes = decodes or is_decoder
                found.append((part, *_stage(tensor)))
                continue
            begins, ends = name[: block.end()], block.end() - 1
            if begins not in blocks:
                part, is_decoder = _part(name[: block.start() + 1])
                decodes = decodes or is_decoder
                _, kind, number = block.groups()
                stage, prefix = _KINDS.get(kind or block[1], (0, ""))
                label = ".".join(one for one in (prefix, number) if one)
                blocks[begins] = part, (stage << 32) + int(number or 0), label
            known = blocks[begins]
            if not begins.endswith("."):  # the whole name: `h.1` is no part of `h.10`
                begins = ""
        if ("eh_proj" in name or "nextn" in name) and _GUESSING.search(name, ends):
            guessing.add(known)
        found.append(known)
    different = set(found)
    both = decodes and any(part == _ENCODER for part, _, _ in different)
    settled = {one: _settled(one, guessing, both=both) for one in different}
    labels = _labelled(set(settled.values()))
    placed = {one: labels[settled[one]] for one in different}
    return [placed[one] for one in found]


def _settled(one: _Found, guessing: set[_Found], *, both: bool) -> _Found:
    """The same, now that the whole model was seen; `both` when it has an encoder and a decoder."""
    part, stage, label = one
    if one in guessing:
        return _GUESSES, stage, label
    # An encoder alone (BERT) is the model; without one, nothing is shared with it.
    if (part == _ENCODER and not both) or (part == _SHARED and not (both and stage == _BEFORE)):
        return _MODEL, stage, label
    return one


def _labelled(found: set[_Found]) -> dict[_Found, tuple[Place, str]]:
    parts = {part for part, _, _ in found}
    several = len(parts - {_SHARED, _MODEL}) + bool(parts & {_SHARED, _MODEL}) > 1
    # Two embeddings, one of both sides and one of the decoder alone, need two labels.
    decoders_own = _SHARED in parts and any(part == _MODEL and stage == _BEFORE for part, stage, _ in found)
    made: dict[_Found, tuple[Place, str]] = {}
    for part, stage, told in found:
        name, label = _PARTS[part], told
        if part == _MODEL and not (decoders_own and stage == _BEFORE):
            name = ""
        if part == _PROJECTOR and stage == _OTHER:
            label, name = name, ""
        made[part, stage, told] = (part, stage), f"{name}.{label}" if several and name else label
    return made


def _part(name: str) -> tuple[int, bool]:
    """The part that a name speaks of, and whether that is a decoder."""
    found = _PART.search(name)
    if found is None or found.lastindex is None:
        return _SHARED, False
    return _OF_GROUP[found.lastindex - 1], found.lastindex == _DECODER_GROUP


def _stage(tensor: TensorExtent) -> tuple[int, str]:
    """Stage and label of what lies in no block."""
    if tensor.role in (Role.NORM, Role.OTHER):
        if _BEFORE_BLOCKS.search(tensor.name):
            return _STAGES[Role.EMBEDDING]
        if tensor.role is Role.OTHER and _AFTER_BLOCKS.search(tensor.name):
            return _STAGES[Role.HEAD]
    return _STAGES.get(tensor.role, (_OTHER, "other"))
