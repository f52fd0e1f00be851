"""Timelines as a daemon would answer them, for tests of what is made from them."""

from __future__ import annotations

from typing import Any

from prefetch.timeline import Timeline

MIB = 1 << 20
BLOCKS = 30
STRANGE = 'llama"><script>alert(1)</script>&\x1b[31m\udcff'
"""A model's name is whatever its folder is called."""


def cold_load(timeline: Timeline, model: str = "meta/llama-3-8b", *, at_s: float = 100.0) -> None:
    """A model of 30 blocks whose parts come one after the other, 0.1 s each; the head was in memory before."""
    layers = [("embedding", 64 * MIB), *((str(n), 128 * MIB) for n in range(BLOCKS)), ("norm", MIB), ("head", 64 * MIB)]
    load = timeline.begin(model, "config.json", at_s, layers)
    load.opened(at_s, "config.json")
    load.submitted(at_s + 0.004)
    resident = [0] * len(layers)
    resident[-1] = layers[-1][1]
    load.sample(at_s + 0.001, resident)
    for number, (_, nbytes) in enumerate(layers[:-1]):
        for half in (1, 2):
            resident[number] = nbytes * half // 2
            load.sample(at_s + 0.1 * number + 0.05 * half, resident)
    load.opened(at_s + 1.2, "model-00001-of-00002.safetensors")
    load.opened(at_s + 2.0, "model-00002-of-00002.safetensors")
    load.finished(at_s + 3.2, "read")


def sample_document() -> dict[str, Any]:
    """Three loads: one that is still empty and strangely named, one with a reader that waited, one cold."""
    timeline = Timeline(1_700_000_000.0)
    timeline.begin(STRANGE, "warm", 10.0, [])
    waited = timeline.begin("tiny", "model.safetensors", 20.0, [("model.safetensors", 3 * MIB)])
    waited.sample(20.0, [0])
    waited.first_demand_wait(20.1, 0.4)
    waited.sample(20.5, [MIB])
    waited.finished(21.0, "was replaced")
    cold_load(timeline)
    return timeline.document()
