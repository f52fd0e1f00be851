"""What others say of cold starts, none of it reproduced here: it stands beside our figures, and never enters them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MARK: Final = "claimed, not reproduced"
ARTICLE: Final = "an article of May 2026, 7B FP16 (14 GB) on an A100"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Of one technique.

    Attributes:
        seconds: of a cold start.
        snapshot_bytes: on the disk; None where it says nothing.
        gpu_bytes: of GPU memory held; None where it says nothing.
    """

    seconds: float
    snapshot_bytes: float | None = None
    gpu_bytes: float | None = None


CLAIMS: Final = {
    "none": Claim(seconds=15.2),
    "prefetch": Claim(seconds=10.1),
    "mount": Claim(seconds=8.4),
    "process": Claim(seconds=2.3, snapshot_bytes=2.1e9, gpu_bytes=14.0e9),
    "suspend": Claim(seconds=1.8, gpu_bytes=14.2e9),
    "released plain": Claim(seconds=0.38, gpu_bytes=16.3e9),
}
"""By the technique of ours that comes nearest. The article does not say what was in memory before each start."""

OTHERS: Final = (
    ("NVIDIA Dynamo snapshot", "8B on B200, to ready", "58 s to 8.1 s"),
    ("vLLM snapshot", "mean of several models", "95.7 s to 13.8 s"),
    ("Modal", "whole stack", "about 2000 s to 50 s"),
    ("vLLM with prefetch on a network mount", "DeepSeek-V3, load", "1500 s to 435 s"),
    ("InstantTensor 0.2", "Qwen3-30B on H200, load", "1.77 s"),
    ("ServerlessLLM store", "Qwen3-32B, load, cached", "1.3 s"),
    ("safetensors 0.9rc prefetch", "GLM-5.2 on B200, load", "14 to 19 s"),
)
"""Who, what, and the figure as its vendor gives it; other models, machines and starting lines than ours."""
