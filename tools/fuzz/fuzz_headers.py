"""Fuzzes a header parser with atheris: any bytes must give a layout whose tensors lie in the file, or a FormatError.

    python tools/fuzz/fuzz_headers.py safetensors|gguf [libFuzzer options, such as -max_total_time=60]

The seeds are made in a temporary folder. For safetensors the library is asked too: what it and we both take must be the
same bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator

import atheris

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

with atheris.instrument_imports(include=["weightfs.formats"]):
    from tests.unit.formats.samples import ARRAY, STRING, UINT32, Gguf, entry, library_tensors, reader, safetensors
    from weightfs.errors import FormatError
    from weightfs.formats import WeightLayout, parse_header
    from weightfs.formats.safetensors import DTYPE_BITS


def check_layout(layout: WeightLayout, data: bytes) -> None:
    spans = [(tensor.offset, tensor.offset + tensor.nbytes) for tensor in layout.tensors]
    if any(not 0 < begin <= end <= len(data) for begin, end in spans):
        raise AssertionError("a tensor lies outside the file")
    if any(begin < end for (_, end), (begin, _) in itertools.pairwise(spans)):
        raise AssertionError("tensors overlap")
    if len({tensor.name for tensor in layout.tensors}) != len(spans):
        raise AssertionError("a name occurs twice")


def fuzz_safetensors(data: bytes) -> None:
    # Of bytes alone 98 of 100 end as bad JSON, so the first one decides: a file as it is, a header whose lengths are
    # set right, or one made of sound JSON whose values are to be judged.
    first, rest = data[:1], data[1:]
    if first == b"\xff":
        data = rest
    elif first < b"\x80":
        data = safetensors(rest, first[0] if first else 0)
    else:
        data = nearly_sound(atheris.FuzzedDataProvider(rest))
    try:
        layout = parse_header("m.safetensors", len(data), reader(data))
    except FormatError:
        return
    check_layout(layout, data)
    other = library_tensors(data)
    ours = {t.name: (t.dtype, list(t.shape), data[t.offset : t.offset + t.nbytes]) for t in layout.tensors}
    if other is not None and other != ours:
        raise AssertionError("the library reads other tensors")


def nearly_sound(source: atheris.FuzzedDataProvider) -> bytes:
    """Makes a file that is right but for what an odd byte of `source` puts wrong."""
    entries: list[str] = []
    end = 0
    for number in range(source.ConsumeIntInRange(0, 6)):
        dtype = source.PickValueInList(DTYPES)
        shape = [source.ConsumeIntInRange(0, 4) for _ in range(source.ConsumeIntInRange(0, 4))]
        begin, end = end, end + math.prod(shape) * DTYPE_BITS.get(dtype, 8) // 8
        name = f"blk.{number}"
        odd = source.ConsumeIntInRange(0, 40)  # 0 once `source` is used up
        shift = 0
        if 1 <= odd <= len(ODD_SHAPES):
            shape.append(ODD_SHAPES[odd - 1])
        elif odd == 20:
            shift = source.ConsumeIntInRange(-9, 9)
        elif odd == 21:
            end += source.ConsumeIntInRange(-9, 9)
        elif odd == 22:
            name = source.PickValueInList(ODD_NAMES)
        text = json.dumps(entry(dtype, shape, begin + shift, end + shift))
        if odd == 23:
            at = source.ConsumeIntInRange(0, len(text))
            text = text[:at] + source.PickValueInList(list(WORDS)) + text[at:]
        entries.append(f'"{name}": {text}')
    if source.ConsumeBool():
        entries.insert(source.ConsumeIntInRange(0, len(entries)), '"__metadata__": {"shape": "x", "a": "\\u00e4"}')
    else:
        entries.reverse()
    header = ("{" + ", ".join(entries) + "}").encode()
    trailing = source.PickValueInList([0, 0, 0, 0, 0, 0, -1, 1])
    return safetensors(header, min(max(end + trailing, 0), 1 << 16))


def fuzz_gguf(data: bytes) -> None:
    try:
        layout = parse_header("m.gguf", len(data), reader(data))
    except FormatError:
        return
    check_layout(layout, data)


def safetensors_seeds() -> Iterator[bytes]:
    plain = entry("F32", [2], 0, 8)
    for header in ({}, {"a": plain}, {"__metadata__": {"k": "v"}, "a": plain, "b": entry("F4", [2, 1], 8, 9)}):
        for data_bytes in (0, 8, 9):
            yield b"\xff" + safetensors(header, data_bytes)
            yield bytes([data_bytes]) + safetensors(header)[8:]
    for fill in range(0, 256, 15):
        yield b"\x80" + bytes([fill, 255 - fill]) * 40


def gguf_seeds() -> Iterator[bytes]:
    for order, version in (("<", 2), ("<", 3), (">", 3)):
        spell = Gguf(">" if order == ">" else "<", version)
        nested = spell.array(ARRAY, 2, spell.array(STRING, 1, spell.string("x")) * 2)
        keys = [
            spell.key("general.alignment", UINT32, spell.pack("I", 8)),
            spell.key("text", STRING, spell.string("value")),
            spell.key("strings", ARRAY, spell.array(STRING, 2, spell.string("a") + spell.string("bc"))),
            spell.key("nested", ARRAY, nested),
            *(spell.key(f"k{kind}", kind, bytes(8)[:size]) for kind, size in ((0, 1), (2, 2), (6, 4), (7, 1), (12, 8))),
        ]
        tensors = [spell.tensor("a", [2, 3], 0, 0), spell.tensor("blk.0.w", [32], 2, 24)]
        yield spell.file()
        yield spell.file(keys, (), 0, alignment=8)
        yield spell.file(keys[:1], tensors, 48, alignment=8)
        yield spell.file(keys, tensors, 48, alignment=8)


DTYPES = [*DTYPE_BITS, "U4"]
ODD_SHAPES = [-1, 0, 1 << 40, 1 << 62, 1 << 63, 1 << 64]
ODD_NAMES = ["blk.0", "\\u0062lk.0", "dtype", "data_offsets", "", "\\ud800", "__metadata__"]

# msgspec is compiled and tells the fuzzer nothing of the way into it, so the words that matter are given.
WORDS = (
    *('"dtype":', '"shape":', '"data_offsets":', '"__metadata__":', '"a":', '"U8"', '"F4"', '"F6_E2M3"', '"BF16"'),
    *("{}", "[0,0]", "[0,1]", "[1,2]", "[]", "null", "-1", "9223372036854775807", "1e9", "\\u0061", "\\ud800"),
    '"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},',
)

TARGETS = {"safetensors": (fuzz_safetensors, safetensors_seeds), "gguf": (fuzz_gguf, gguf_seeds)}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)} [libFuzzer options]")
    target, seeds = TARGETS[sys.argv[1]]
    with tempfile.TemporaryDirectory(prefix="weightfs-fuzz-") as folder:
        words = os.path.join(folder, "words")
        with open(words, "w") as file:
            file.writelines(json.dumps(word) + "\n" for word in WORDS)
        corpus = os.path.join(folder, "corpus")
        os.mkdir(corpus)
        for number, seed in enumerate(seeds()):
            with open(os.path.join(corpus, f"seed-{number}"), "wb") as seed_file:
                seed_file.write(seed)
        # libFuzzer ends its process without unwinding, so the folder is removed by another.
        child = os.fork()
        if child == 0:
            atheris.Setup([sys.argv[0], f"-dict={words}", *sys.argv[2:], corpus], target)
            atheris.Fuzz()
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
