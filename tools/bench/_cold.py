"""What cold measurements need: files that are proven not to be in memory, a read-ahead that is put back, models."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from _harness import MIB, drop, resident

from weightfs.control import ask

BLOCKS: Final = 30
_VOCABULARY: Final = 32_000
_HEAD: Final = 64
_ANSWER_S: Final = 60.0
_SETTLE_S: Final = 1.2
"""A model that was planned less than a second ago is not planned again: each round waits that long."""
_TRIES: Final = 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


# Cold


def make_cold(paths: Sequence[str]) -> None:
    """Have the kernel forget these files, and everything else that it can; returns once mincore(2) says 0 of each.

    Raises:
        SystemExit: some of it stays in memory.
    """
    time.sleep(_SETTLE_S)
    for _ in range(_TRIES):
        os.sync()
        for path in paths:
            drop(path)
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3\n")
        shares = {path: resident(path) for path in paths}
        if not any(shares.values()):
            return
        time.sleep(0.5)  # a read that was under way has ended by then
    raise SystemExit(f"stays in memory: {shares}")


@contextlib.contextmanager
def read_ahead(path: str, kb: int) -> Iterator[None]:
    """Set `read_ahead_kb` of the device that `path` lies on, and put it back whatever happens.

    Raises:
        SystemExit: that device has no such setting.
    """
    setting = _setting(path)
    with open(setting) as file:
        before = file.read()
    try:
        with open(setting, "w") as file:
            file.write(str(kb))
        yield
    finally:
        with open(setting, "w") as file:
            file.write(before)


def _setting(path: str) -> str:
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for folder in (f"/sys/class/bdi/{number}", f"/sys/dev/block/{number}/queue", f"/sys/dev/block/{number}/../queue"):
        setting = os.path.join(folder, "read_ahead_kb")
        if os.path.exists(setting):
            return setting
    raise SystemExit(f"{path}: its device has no read_ahead_kb")


class Watched:
    """A file mapped for mincore(2): whether ranges of it are in memory, without touching them."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        view = np.frombuffer(self._mapping, dtype=np.uint8)
        self._at, self._size = view.ctypes.data, len(view)

    def share(self, ranges: Sequence[tuple[int, int]] | None = None) -> float:
        """The part of these (offset, bytes), or of the whole file, that is in memory and up to date."""
        found = asked = 0
        for offset, nbytes in ranges or [(0, self._size)]:
            first = offset // mmap.PAGESIZE * mmap.PAGESIZE
            length = min(offset + nbytes, self._size) - first
            pages = np.zeros(-(-length // mmap.PAGESIZE), dtype=np.uint8)
            if _libc.mincore(self._at + first, length, pages.ctypes.data):
                raise OSError(ctypes.get_errno(), "mincore")
            found += int((pages & 1).sum())
            asked += len(pages)
        return found / asked


# The daemon


@dataclass(frozen=True, slots=True)
class Daemon:
    """Asks a mount's daemon without starting a process."""

    socket: str
    pid: int

    def warm(self, name: str) -> None:
        """Begin to read a model of the mount ahead."""
        self._models({"command": "warm", "path": name, "layers": None})

    def is_reading(self, name: str) -> bool:
        """Whether one of its models is being read."""
        models = self._models({"command": "residency", "path": name})
        names = [one["model"] for one in models]
        return any(one["active"] for one in self._models({"command": "progress", "models": names}))

    def filled_s(self) -> float | None:
        """Seconds from the last load's trigger until all of it was read, None before."""
        loads = ask(self.socket, {"command": "timeline"}, _ANSWER_S)["loads"]
        return None if loads[-1]["finished_s"] is None else float(loads[-1]["finished_s"])

    def wait(self, name: str) -> None:
        """Return once it is not being read any more."""
        while self.is_reading(name):
            time.sleep(0.05)

    def cpu_s(self) -> float:
        """CPU seconds that its process has used, in user and kernel mode."""
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _models(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        return list(ask(self.socket, request, _ANSWER_S)["models"])


# Models


@dataclass(frozen=True, slots=True)
class Model:
    """A model of 30 blocks in one safetensors file, in the order in which safetensors writes: by name.

    Attributes:
        weights: its file.
        first: (offset, bytes) of the embedding and of the first block.
        nbytes: of the file.
    """

    weights: str
    first: list[tuple[int, int]]
    nbytes: int


def write_llama(folder: str, nbytes: int) -> Model:
    """A Llama of about that size in bfloat16; its embedding and first block stand near the front of the file."""
    width = _width(nbytes)
    names = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "block": "model.layers.{}."}
    parts = {
        "input_layernorm": [width],
        "post_attention_layernorm": [width],
        **{f"self_attn.{name}_proj": [width, width] for name in "qkvo"},
        **{f"mlp.{name}_proj": [4 * width, width] for name in ("gate", "up")},
        "mlp.down_proj": [width, 4 * width],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": width // _HEAD,
        "num_key_value_heads": width // _HEAD,
        "vocab_size": _VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return _write(folder, config, names, parts, width)


def write_gpt(folder: str, nbytes: int) -> Model:
    """One with GPT-2's names, by which its embedding (`wte`) stands at the end of the file."""
    width = _width(nbytes)
    names = {"embedding": "transformer.wte.weight", "norm": "transformer.ln_f.weight", "block": "transformer.h.{}."}
    parts = {
        "ln_1": [width],
        "attn.c_attn": [width, 3 * width],
        "attn.c_proj": [width, width],
        "mlp.c_fc": [width, 6 * width],
        "mlp.c_proj": [6 * width, width],
    }
    return _write(folder, {"model_type": "gpt2"}, names, parts, width)


def _width(nbytes: int) -> int:
    """So that 30 blocks of 16 w^2 and twice the vocabulary, two bytes each, are about `nbytes`."""
    a, b = 2 * 16 * BLOCKS, 2 * 2 * _VOCABULARY
    return max(_HEAD, round((math.sqrt(b * b + 4 * a * nbytes) - b) / (2 * a) / _HEAD) * _HEAD)


def _write(
    folder: str, config: dict[str, Any], names: dict[str, str], parts: dict[str, list[int]], width: int
) -> Model:
    os.mkdir(folder)
    shapes = {names["embedding"]: [_VOCABULARY, width], "lm_head.weight": [_VOCABULARY, width], names["norm"]: [width]}
    for number in range(BLOCKS):
        shapes |= {f"{names['block'].format(number)}{part}.weight": shape for part, shape in parts.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, extents = 0, {}
    for name, shape in sorted(shapes.items()):
        extents[name] = at, math.prod(shape) * 2
        at += extents[name][1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [extents[name][0], at]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    weights = os.path.join(folder, "model.safetensors")
    random = np.random.default_rng(4)
    with open(weights, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(at, 0, -8 * MIB):
            file.write(random.bytes(min(left, 8 * MIB)))
        file.flush()
        os.fsync(file.fileno())
    with open(os.path.join(folder, "config.json"), "w") as out:
        json.dump(config, out)
    start = 8 + len(text)
    wanted = (names["embedding"], names["block"].format(0))
    first = [(start + offset, length) for name, (offset, length) in extents.items() if name.startswith(wanted)]
    return Model(weights, first, start + at)
