"""Weights into a module that is there already, as `safetensors.torch.load_model`, without a second copy of them.

What has the file's dtype is read to where it will stay. What has another, or is a part of the file's tensor, goes by
way of memory on the same device, `ARENA_BYTES` at a time, and is cast and cut there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import torch
from torch import nn

from weightfs.torch.asking import ask_for
from weightfs.torch.files import Path, Stored, WeightFile, by_name, find_files, stored
from weightfs.torch.loader import Device, in_order, load_stored, torch_device
from weightfs.torch.memory import arenas, fill
from weightfs.torch.parts import Part, Shard, part_of
from weightfs.torch.targets import Target, loads_its_own_way, place_of, targets_of, tied

_FILLABLE: Final = ("cpu", "cuda")
_PLAIN: Final = (torch.Tensor, nn.Parameter, nn.Buffer)
"""Whose address is that of their numbers: a subclass may be something else, as DTensor is."""


def load_model(
    model: nn.Module,
    filename: Path | Iterable[Path],
    strict: bool = True,
    device: Device | None = None,
    *,
    dtype: torch.dtype | None = None,
    shard: Shard | tuple[int, int, Mapping[str, int]] | None = None,
) -> tuple[set[str], list[str]]:
    """Load weights into a module, in place and in the order in which it needs them.

    Parameters keep their identity and what is tied stays so. Only those on no device (`meta`) are replaced, by new ones
    with the same attributes; what the file does not have stays there.

    Args:
        model: the module.
        filename: a weight file, a folder that holds one model, or its shards.
        strict: whether anything missing or unexpected is an error.
        device: where what is loaded is to be; left out, where it is, and on the CPU for what is on no device.
        dtype: what floating-point weights become; left out, each keeps its own, and the file's values are cast.
        shard: the part of the file's tensors that this process has; the module has the shapes of the parts.

    Returns:
        Names that the module has and the file has not, and the other way round. Memory of several names (tied weights)
        is missing if the file has none of them, and each name beyond the first is unexpected.

    Raises:
        RuntimeError: something is missing or unexpected, with `strict`; or shapes differ. Nothing is loaded then.
        UsageError: a dimension can't be divided as `shard` says.
        BadHeaderError: a header does not describe its file.
        FormatError: shards are missing.
        OSError: a file can't be opened or read.
    """
    names = find_files(filename)
    ask_for(names)
    with contextlib.ExitStack() as stack, torch.no_grad():
        files = [stack.enter_context(WeightFile(name)) for name in names]
        sources = {name: stored(file, name) for name, file in by_name(files).items()}
        targets = targets_of(model)
        ties = tied(targets, sources)
        missing, unexpected = _differences(targets, sources, ties)
        if strict and (missing or unexpected):
            raise RuntimeError(_complaint(model, missing, unexpected))
        part = Shard(*shard) if shard is not None else None
        parts = {name: part_of(source, part) for name, source in sources.items() if name in targets}
        if faults := _mismatches(targets, parts):
            raise RuntimeError(f"Error(s) in loading state_dict for {type(model).__name__}:\n\t" + "\n\t".join(faults))
        _make_room(targets, parts, None if device is None else torch_device(device), dtype)
        targets = targets_of(model)
        if loads_its_own_way(model) or _overlap(targets, ties):
            model.load_state_dict(_as_state_dict(targets, parts), strict=False)
        else:
            _load(targets, parts)
    return missing, unexpected


def _differences(
    targets: Collection[str], sources: Mapping[str, Stored], ties: Sequence[tuple[str, list[str]]]
) -> tuple[set[str], list[str]]:
    missing = {name for name in targets if name not in sources}
    unexpected = [name for name in sources if name not in targets]
    for name in (name for _, others in ties for name in others):
        if name in missing:
            missing.remove(name)
        else:
            unexpected.append(name)
    return missing, unexpected


def _complaint(model: nn.Module, missing: Collection[str], unexpected: Collection[str]) -> str:
    """In the words of safetensors."""
    text = f"Error(s) in loading state_dict for {type(model).__name__}:"
    for what, names in (("Missing", missing), ("Unexpected", unexpected)):
        if names:
            listed = ", ".join(f'"{name}"' for name in sorted(names))
            text += f"\n    {what} key(s) in state_dict: {listed}"
    return text


def _mismatches(targets: Mapping[str, Target], parts: Mapping[str, Part]) -> list[str]:
    """In the words of torch."""
    return [
        f"size mismatch for {name}: copying a param with shape {torch.Size(part.shape)} from checkpoint, "
        f"the shape in current model is {targets[name].tensor.shape}."
        for name, part in parts.items()
        if targets[name].tensor.shape != part.shape
    ]


def _make_room(
    targets: Mapping[str, Target], filled: Collection[str], device: torch.device | None, dtype: torch.dtype | None
) -> None:
    """Give what will be filled the device and dtype that it is to have, under all its names."""
    if device is not None and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    wanted = {id(targets[name].tensor) for name in filled}
    made: dict[int, torch.Tensor] = {}
    for target in targets.values():
        old = target.tensor
        if id(old) not in wanted:
            continue
        kind = dtype if dtype is not None and old.is_floating_point() else old.dtype
        place = device or (torch.device("cpu") if old.is_meta else old.device)
        if id(old) in made:
            target.put(made[id(old)])
        elif old.is_meta:
            made[id(old)] = target.renewed(torch.empty(old.shape, dtype=kind, device=place))
            target.put(made[id(old)])
        elif (kind, place) != (old.dtype, old.device):
            old.data = torch.empty(old.shape, dtype=kind, device=place)


def _overlap(targets: Mapping[str, Target], ties: Sequence[tuple[str, list[str]]]) -> bool:
    """Whether some weights are parts of others, so that the order in which they are filled matters."""
    return any(len({place_of(targets[name].tensor) for name in (kept, *others)}) > 1 for kept, others in ties)


def _as_state_dict(targets: Mapping[str, Target], parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for device, names in _by_device(targets, parts).items():
        read = load_stored([parts[name].source for name in names], device)
        found.update((name, parts[name].cut(one)) for name, one in zip(names, read, strict=True))
    return {name: found[name] for name in targets if name in found}


def _load(targets: Mapping[str, Target], parts: Mapping[str, Part]) -> None:
    for device, names in _by_device(targets, parts).items():
        # Of several names for the same memory the last one counts, as with `load_state_dict`.
        last = {place_of(targets[name].tensor): name for name in names}
        kept = list(last.values())
        names_in_order = [kept[number] for number in in_order([parts[name].source for name in kept])]
        straight = [name for name in names_in_order if _fits(targets[name].tensor, parts[name])]
        fill([parts[name].source for name in straight], [targets[name].tensor for name in straight], device)
        others = [name for name in names_in_order if name not in set(straight)]
        for wave in arenas([parts[name].source.nbytes for name in others]):
            read = load_stored([parts[name].source for name in others[wave]], device)
            for name, one in zip(others[wave], read, strict=True):
                targets[name].tensor.copy_(parts[name].cut(one))


def _by_device(targets: Mapping[str, Target], parts: Mapping[str, Part]) -> dict[torch.device, list[str]]:
    found: dict[torch.device, list[str]] = {}
    for name, target in targets.items():
        if name in parts:
            found.setdefault(target.tensor.device, []).append(name)
    return found


def _fits(tensor: torch.Tensor, part: Part) -> bool:
    """Whether the file's bytes are the tensor's."""
    return bool(
        part.dim is None
        and tensor.dtype == part.source.form.dtype
        and tensor.is_contiguous()
        and tensor.device.type in _FILLABLE
        and type(tensor) in _PLAIN
    )
