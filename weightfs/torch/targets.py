"""What a module has that weights go into: its parameters and buffers, where they lie, and which of them are one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn


class Target(NamedTuple):
    """A parameter or persistent buffer, under one of its names.

    Attributes:
        owner: the module that holds it.
        attribute: its name there.
        tensor: itself, not detached.
    """

    owner: nn.Module
    attribute: str
    tensor: torch.Tensor

    @property
    def is_parameter(self) -> bool:
        """Whether it is one; else it is a buffer."""
        return self.attribute in self.owner._parameters

    def renewed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Another tensor as the parameter or buffer that this is, with the attributes that were set on it."""
        made = nn.Parameter(tensor, requires_grad=self.tensor.requires_grad) if self.is_parameter else tensor
        made.__dict__.update(self.tensor.__dict__)
        return made

    def put(self, tensor: torch.Tensor) -> None:
        """Have the module hold another tensor under this name."""
        (self.owner._parameters if self.is_parameter else self.owner._buffers)[self.attribute] = tensor


def targets_of(module: nn.Module) -> dict[str, Target]:
    """Every parameter and persistent buffer, by the name that a state dict has for it, in its order."""
    return dict(_targets(module))


def _targets(module: nn.Module) -> Iterator[tuple[str, Target]]:
    for prefix, owner in module.named_modules(remove_duplicate=False):
        kept = {
            **owner._parameters,
            **{name: one for name, one in owner._buffers.items() if name not in owner._non_persistent_buffers_set},
        }
        for name, tensor in kept.items():
            if tensor is not None:
                yield (f"{prefix}.{name}" if prefix else name), Target(owner, name, tensor)


def loads_its_own_way(module: nn.Module) -> bool:
    """Whether a part of it changes what it is given: by a hook, or a method of its own."""
    return any(
        one._load_state_dict_pre_hooks
        or one._state_dict_hooks
        or type(one)._load_from_state_dict is not nn.Module._load_from_state_dict
        for one in module.modules()
    )


def tied(targets: Mapping[str, Target], names: Collection[str]) -> list[tuple[str, list[str]]]:
    """Names of memory that has several, as safetensors finds them: it saves such memory under one name.

    Args:
        targets: of a module.
        names: in the file.

    Returns:
        For each such memory the name that counts, one in the file where there is one, and the others, sorted.
    """
    found = []
    for group in _sharing(targets):
        whole = sorted(name for name in group if _is_whole(targets[name].tensor)) or sorted(group)
        kept = next((name for name in whole if name in names), whole[0])
        found.append((kept, sorted(group - {kept})))
    return found


def _sharing(targets: Mapping[str, Target]) -> Iterator[set[str]]:
    """Sets of names whose memory overlaps; on no device (meta) those that are one tensor."""
    places: dict[tuple[object, ...], list[tuple[int, int, str]]] = {}
    for name, (_, _, tensor) in targets.items():
        if tensor.is_meta:
            places.setdefault((id(tensor),), []).append((0, 1, name))
        elif tensor.numel():
            start = tensor.data_ptr()
            places.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(
                (start, start + _span_bytes(tensor), name)
            )
    for areas in places.values():
        areas.sort()
        group: set[str] = set()
        end = areas[0][0]
        for start, stop, name in areas:
            if start >= end and group:
                if len(group) > 1:
                    yield group
                group = set()
            group.add(name)
            end = max(end, stop)
        if len(group) > 1:
            yield group


def place_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """The same for two tensors that are the same numbers in the same memory."""
    if not tensor.numel():
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _span_bytes(tensor: torch.Tensor) -> int:
    """From its first byte to behind its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((steps + 1) * tensor.itemsize)


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether it is all of its storage."""
    if tensor.is_meta:
        return True
    storage = tensor.untyped_storage()
    return bool(tensor.data_ptr() == storage.data_ptr() and tensor.nbytes == storage.nbytes())
