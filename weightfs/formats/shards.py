"""Which weight files form one model, and their layouts as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from weightfs.errors import FormatError
from weightfs.formats.layout import TensorExtent, WeightLayout

SUFFIXES = {".safetensors": "safetensors", ".gguf": "gguf"}
"""Format by file name suffix. Case matters, as it does to the loaders. In order of preference for a set's name."""

MAX_INDEX_BYTES = 100_000_000
"""The limit on a safetensors header, which holds more for each tensor."""

_SHARD = re.compile(r"(.+)-([0-9]{1,9})-of-([0-9]{1,9})(\.safetensors|\.gguf)", re.DOTALL)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_decode_index = msgspec.json.Decoder(_Index).decode


def format_of(name: str) -> str | None:
    """Tells a file's format by its suffix.

    Args:
        name: of the file, or a path to it.

    Returns:
        `safetensors`, `gguf`, or None. A name that is nothing but a suffix has no format: it is a hidden file.
    """
    for suffix, kind in SUFFIXES.items():
        if name.endswith(suffix) and not name.endswith("/" + suffix) and name != suffix:
            return kind
    return None


def group_shards(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Groups a folder's weight files into sets.

    `STEM-00001-of-00003.safetensors` and its siblings, of the same total and suffix, form the set `STEM`; any other
    weight file is a set of its own, named by its stem. Missing shards are left to `check_shards`. A shard whose number
    is out of range, or taken by another spelling (`1` beside `00001`), is a file of its own.

    Names of sets are unique. Where several sets have the same stem the first takes it: single files before shard
    groups, safetensors before GGUF, then by name. Each other set, and a set whose stem is the full name of a weight
    file in the folder, is named by the full name of its first file.

    Args:
        names: of files in one folder, in any order; what is no weight file is passed over.

    Returns:
        Set name to files in shard order, sorted by set name.
    """
    weight_files = sorted({name for name in names if format_of(name) is not None})
    groups: dict[tuple[str, str, int], dict[int, str]] = {}
    # Sorted by what decides a collision: whether it is a group, the suffix, then the files.
    sets: list[tuple[bool, int, tuple[str, ...], str]] = []
    rank = {suffix: index for index, suffix in enumerate(SUFFIXES)}
    for name in weight_files:
        shard = _shard_of(name)
        if shard is not None:
            stem, suffix, part, total = shard
            if groups.setdefault((stem, suffix, total), {}).setdefault(part, name) == name:
                continue
        stem, dot, suffix = name.rpartition(".")
        sets.append((False, rank[dot + suffix], (name,), stem))
    for (stem, suffix, _), group in groups.items():
        sets.append((True, rank[suffix], tuple(group[part] for part in sorted(group)), stem))

    named: dict[str, tuple[str, ...]] = {}
    taken = set(weight_files)
    for _, _, files, stem in sorted(sets):
        name = files[0] if stem in taken else stem
        taken.add(name)
        named[name] = files
    return dict(sorted(named.items()))


def _shard_of(name: str) -> tuple[str, str, int, int] | None:
    """Splits a shard's name into stem, suffix, number and total; None if it is no shard's."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return None
    part, total = int(match[2]), int(match[3])
    return (match[1], match[4], part, total) if 1 <= part <= total else None


def check_shards(files: Sequence[str]) -> None:
    """Checks that a set from `group_shards` is whole.

    Raises:
        FormatError: `missing-shard`, naming the first that is absent. Its offset is 0: there is no file to point into.
    """
    shards = [shard for name in files if (shard := _shard_of(name)) is not None]
    if not shards:
        return
    stem, suffix, _, total = shards[0]
    present = {part for _, _, part, _ in shards}
    if len(present) < total:
        # A total may be 999,999,999, so nothing of that length is built; the search ends within `present`.
        missing = next(part for part in range(1, total + 1) if part not in present)
        raise FormatError(
            "missing-shard",
            f"{total - len(present)} of {total} shards of {stem}{suffix} are missing, the first is number {missing}",
            offset=0,
        )


def parse_weight_map(data: bytes) -> dict[str, str]:
    """Reads a `*.safetensors.index.json`, which tells the shard of each tensor.

    Args:
        data: the whole file.

    Returns:
        Tensor name to file name; the file names are as untrusted as the rest of it, and are only ever compared.

    Raises:
        FormatError: `index-length` over `MAX_INDEX_BYTES`; `index-json` if it is not an object whose `weight_map` maps
            strings to strings.
    """
    if len(data) > MAX_INDEX_BYTES:
        raise FormatError("index-length", f"index of {len(data)} bytes exceeds {MAX_INDEX_BYTES}", offset=0)
    try:
        return _decode_index(data).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError("index-json", f"index can't be decoded: {error}", offset=0) from error


def merge_shards(layouts: Sequence[WeightLayout], weight_map: Mapping[str, str] | None) -> WeightLayout:
    """Joins the layouts of a set's files.

    Args:
        layouts: one or more, in shard order, all of one format.
        weight_map: from `parse_weight_map`; None if the folder has no index. A tensor that it does not list is kept,
            and what it says of files that are not in `layouts` is left to `check_shards`.

    Returns:
        All tensors, in file order. Where shards disagree on a metadata key, the first one's value.

    Raises:
        FormatError: `duplicate-tensor` if two files have a tensor of the same name and `weight_map` picks neither;
            `missing-tensor` if `weight_map` sees one in a file that lacks it; `mixed-set` if formats or byte orders
            differ. Offsets are 0, or the later tensor's.
    """
    first = layouts[0]
    files = tuple(file for layout in layouts for file in layout.files)
    present = set(files)
    wanted = {name: file for name, file in (weight_map or {}).items() if file in present}
    metadata: dict[str, str] = {}
    owners: dict[str, TensorExtent] = {}
    for layout in layouts:
        if (layout.format, layout.byte_order) != (first.format, first.byte_order):
            raise FormatError("mixed-set", f"{first.files[0]} and {layout.files[0]} differ in format", offset=0)
        metadata = {**layout.metadata, **metadata}
        for tensor in layout.tensors:
            owner = owners.setdefault(tensor.name, tensor)
            if owner is tensor:
                continue
            if tensor.name not in wanted:
                raise FormatError(
                    "duplicate-tensor", f"{tensor.name!r} is in {owner.file} and {tensor.file}", offset=tensor.offset
                )
            if tensor.file == wanted[tensor.name]:
                owners[tensor.name] = tensor
    for name, file in wanted.items():
        if name not in owners or owners[name].file != file:
            raise FormatError("missing-tensor", f"the index sees {name!r} in {file}, which lacks it", offset=0)
    tensors = tuple(tensor for layout in layouts for tensor in layout.tensors if owners[tensor.name] is tensor)
    return WeightLayout(first.format, files, tensors, metadata, first.byte_order)
