"""What a tensor is for, told from its name alone.

Covers Hugging Face transformers (Llama, GPT-2, GPT-NeoX, BERT, T5, BART, CLIP and their kin), PEFT's LoRA prefixes,
diffusers, the original latent-diffusion and Flux names, and GGUF. An unknown name is `Role.OTHER`, which is never
wrong: the role decides how early a tensor is fetched, not whether.
"""

from __future__ import annotations

import re

from weightfs.formats.layout import Role

BLOCK = re.compile(
    r"(?:^|\.)"
    r"(?:(mid_block|middle_block)|((?:[a-z]+_)*(?:layers?|blocks?|resblocks|blk|h))\.([0-9]{1,6}))"
    r"(?:\.|$)"
)
"""The first match counts: an expert, or T5's `block.3.layer.1`, keeps the number of the block that holds it.

Six digits, since a longer number is no block, and Python refuses to convert one of thousands of digits.
"""

_LATER_STAGE = 100
_STAGE = {
    "mid_block": _LATER_STAGE,
    "middle_block": _LATER_STAGE,
    "up_blocks": _LATER_STAGE + 1,
    "output_blocks": _LATER_STAGE + 1,
    "single_blocks": _LATER_STAGE + 1,
    "single_transformer_blocks": _LATER_STAGE + 1,
}
"""What is added to a block's number in models whose stages each count from 0.

A U-Net runs `down_blocks`, `mid_block`, `up_blocks`; Flux runs `transformer_blocks`, then `single_transformer_blocks`.
Numbers must follow that order, and the length of the first stage is not in the name: 100 is more than any has.
"""

_OUTSIDE = re.compile(
    r"(?:^|\.)(?:(lm_head|embed_out|score|classifier|cls|proj_out)(?:\.|$)"
    r"|([a-z_]*(?:embed|embd|wte|wpe)[A-Za-z_]*|shared|token_types)(?:\.|$)"
    r"|([A-Za-z_]*[nN]orm[A-Za-z_0-9]*|ln_f|ln_final|ln_post|ln_pre)(?:\.|$))"
    r"|^(output|head)(?:\.|$)"
)
"""Outside blocks, the first component that says something decides: `embeddings.LayerNorm` goes with the embeddings.

Within one component the order head, embedding, norm applies: `embed_out` is a head, and GGUF's `token_embd_norm` is
needed as early as the embedding. A bare `output` or `head` means something only at the root.
"""

_ROLES = {1: Role.HEAD, 2: Role.EMBEDDING, 3: Role.NORM, 4: Role.HEAD}


def classify(name: str) -> tuple[Role, int | None]:
    """Tells a tensor's role and block number from its name.

    Args:
        name: as the header spells it. Any text; time is linear in its length, about 1 us for a usual one.

    Returns:
        The role, and for `Role.BLOCK` the block number in `[0, 10**6 + 101]`, else None. Everything in a block, norms
        included, belongs to the block. Numbers follow execution order within one tower: see `_STAGE` for models
        whose stages each count from 0.
    """
    block = BLOCK.search(name)
    if block is not None:
        middle, kind, number = block.groups()
        if middle is not None:
            return Role.BLOCK, _STAGE[middle]
        return Role.BLOCK, _STAGE.get(kind, 0) + int(number)
    outside = _OUTSIDE.search(name)
    if outside is None or outside.lastindex is None:
        return Role.OTHER, None
    return _ROLES[outside.lastindex], None
