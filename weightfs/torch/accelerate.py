"""transformers, and whoever else opens files through safetensors, load by weightfs.torch for the length of a block.

What is replaced, wherever a module has it by name: `safetensors.safe_open` and `safetensors.torch.load_file`; and in
transformers 5 the function that puts one tensor on its device (`core_model_loading.spawn_materialize`), because a GPU
is fast only when it is given many at once. What is asked for in a moment is collected, and goes together.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import safetensors
import safetensors.torch
import torch

from weightfs.torch.errors import BadHeaderError
from weightfs.torch.files import Path
from weightfs.torch.loader import Backend, Device, load_file, load_stored, torch_device
from weightfs.torch.memory import ARENA_BYTES
from weightfs.torch.opened import FRAMEWORKS, Slice, safe_open

_THEIR_OPEN: Final = safetensors.safe_open
_THEIR_LOAD: Final = safetensors.torch.load_file
_SPAWN_MODULE: Final = "transformers.core_model_loading"
_SPAWN: Final = "spawn_materialize"
_LEFT_ALONE: Final = ("weightfs.", "safetensors._", "torch.", "numpy.", "scipy.", "sklearn.", "sympy.", "pandas.")
"""Ours, where theirs come from, and two thousand modules that read no safetensors."""

_turn: Final = threading.RLock()
_within = 0
_spawns: Final[dict[Callable[..., Any], Callable[..., Any]]] = {}
"""transformers' own function, and what stands in for it now."""
_seen: Final[set[str]] = set()
"""Modules that were looked through since the first block began."""
_replaced: Final[set[str]] = set()
"""Those of them that had something to replace."""
_target = threading.local()


@contextlib.contextmanager
def accelerate(device: Device | None = None) -> Iterator[None]:
    """Within the block `from_pretrained` and other callers of safetensors load by weightfs.torch, with the same result.

    The replacement is of the process: other threads that load meanwhile do so by weightfs.torch as well. Blocks may be
    within others and in several threads at once; with the end of the last of them all is as it was.

    Args:
        device: where this thread's `from_pretrained` puts what it would put on the CPU: to load to a GPU without
            `device_map`, which needs the package accelerate. Buffers that no file has stay on the CPU: `model.to`.

    Example:
        with accelerate():
            model = AutoModelForCausalLM.from_pretrained(path, device_map="cuda")
    """
    before = getattr(_target, "device", None)
    _enter()
    _target.device = before if device is None else torch_device(device)
    try:
        yield
    finally:
        _target.device = before
        _leave()


def _enter() -> None:
    global _within
    with _turn:
        _within += 1
        _replace(list(sys.modules), {_THEIR_OPEN: _open, _THEIR_LOAD: _load})
        _replace_spawn()


def _leave() -> None:
    global _within
    with _turn:
        _within -= 1
        if not _within:
            # Also in modules that were imported meanwhile; others that had none of it are not looked at again.
            where = [name for name in sys.modules if name in _replaced or name not in _seen]
            _replace(where, {_open: _THEIR_OPEN, _load: _THEIR_LOAD, **{new: old for old, new in _spawns.items()}})
            for kept in (_spawns, _replaced, _seen):
                kept.clear()


def _replace(where: Iterable[str], others: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
    """In every one of these modules that has it: `from safetensors import safe_open` gives each its own name."""
    by_id = {id(old): new for old, new in others.items()}
    ids = by_id.keys()
    for module in where:
        _seen.add(module)
        names = {} if module.startswith(_LEFT_ALONE) else getattr(sys.modules.get(module), "__dict__", {})
        # First without a loop of Python's: of 60,000 names in 1,000 modules some ten are meant.
        if ids.isdisjoint(map(id, names.values())):
            continue
        _replaced.add(module)
        for name, new in [(name, by_id[id(value)]) for name, value in list(names.items()) if id(value) in by_id]:
            setattr(sys.modules[module], name, new)


def _replace_spawn() -> None:
    """In transformers, once it is imported; it opens files before it puts tensors anywhere."""
    with _turn:
        module = sys.modules.get(_SPAWN_MODULE)
        original = getattr(module, _SPAWN, None)
        if _within and original is not None and original not in _spawns.values():
            _spawns[original] = _spawning(original)
            users = [name for name in sys.modules if name.startswith("transformers.")]
            _replace(users, {original: _spawns[original]})


@functools.wraps(_THEIR_OPEN, updated=())
def _open(filename: Path, framework: str = "pt", device: Device = "cpu", *, backend: Backend = "mmap") -> Any:
    """`safetensors.safe_open`; of what is not for torch, and where the two do not agree on a header, its own."""
    _replace_spawn()
    if _within and framework in FRAMEWORKS:  # who took the name as the last block ended has it yet
        with contextlib.suppress(BadHeaderError):
            return safe_open(filename, framework, device, backend=backend)
    return _THEIR_OPEN(filename, framework, device, backend=backend)


@functools.wraps(_THEIR_LOAD)
def _load(filename: Path, device: Device = "cpu", *, backend: Backend = "mmap") -> dict[str, torch.Tensor]:
    if _within:
        with contextlib.suppress(BadHeaderError):
            return load_file(filename, device, backend=backend)
    return dict(_THEIR_LOAD(filename, device, backend=backend))


class _Asked(NamedTuple):
    part: Slice
    device: torch.device
    dtype: torch.dtype | None
    promise: Future[torch.Tensor]


class Gathering:
    """Tensors that are asked for one by one and loaded together, by the threads of whoever asks."""

    def __init__(self) -> None:
        self._asked: deque[_Asked] = deque()
        self._turn = threading.Lock()

    def ask(
        self, threads: ThreadPoolExecutor, part: Slice, device: torch.device, dtype: torch.dtype | None
    ) -> Future[torch.Tensor]:
        """A tensor to come, on a device and of a dtype (None is its own)."""
        promise: Future[torch.Tensor] = Future()
        self._asked.append(_Asked(part, device, dtype, promise))
        # One for each, most of which find nothing left to do: nobody says which is the last.
        threads.submit(self._load_some)
        return promise

    def _load_some(self) -> None:
        with self._turn:
            while some := self._next():
                try:
                    loaded = load_stored([one.part.stored() for one in some], some[0].device)
                    for one, tensor in zip(some, loaded, strict=True):
                        one.promise.set_result(tensor if one.dtype is None else tensor.to(one.dtype))
                except BaseException as error:  # noqa: BLE001  handed to those who wait
                    for one in some:
                        if not one.promise.done():
                            one.promise.set_exception(error)

    def _next(self) -> list[_Asked]:
        """What was asked for first, and what follows for the same device, `ARENA_BYTES` at most."""
        some: list[_Asked] = []
        nbytes = 0
        while self._asked:
            one = self._asked[0]
            nbytes += one.part.stored().nbytes
            if some and (one.device != some[0].device or nbytes > ARENA_BYTES):
                break
            some.append(self._asked.popleft())
        return some


def _spawning(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' way to put a tensor on its device, or ours where that is faster."""
    gathering = Gathering()

    @functools.wraps(original)
    def spawn(thread_pool: Any, tensor: Any, device: Any = None, dtype: Any = None, *rest: Any, **named: Any) -> Any:
        wanted = _wanted(device)
        plain = not any(rest) and named.get("sharding_op") is None
        if thread_pool is None or not plain or not isinstance(tensor, Slice) or wanted.type == "cpu":
            return original(thread_pool, tensor, device if wanted.type == "cpu" else wanted, dtype, *rest, **named)
        return gathering.ask(thread_pool, tensor, wanted, dtype)

    return spawn


def _wanted(device: Any) -> torch.device:
    """Where it is to be, and where this thread's block says it is to be if that is the CPU."""
    told = torch.device("cpu") if device is None else torch_device(device)
    other: torch.device | None = getattr(_target, "device", None)
    return other if other is not None and told.type == "cpu" else told
