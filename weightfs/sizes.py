"""Settings that users write as text: sizes in bytes, time spans, layers by number. Pure."""

from __future__ import annotations

import re
from typing import Final

from weightfs.errors import UsageError

_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_MOST_SECONDS: Final = 10_000 * 604_800
_MOST_BYTES: Final = 1 << 60
_MOST_LAYERS: Final = 100_000


def parse_bytes(text: str) -> int:
    """A size: `20GiB`, `20G`, `512MiB`, `1.5T` or a plain number of bytes. Units are powers of 1024, in either case.

    Raises:
        UsageError: it is no such thing, or 2^60 bytes or more.
    """
    found = re.fullmatch(r"(\d{1,19}(?:\.\d{1,6})?) ?([KMGT]?)(iB|B)?", text.strip(), re.ASCII | re.IGNORECASE)
    if found is None or ("." in found[1] and not found[2]):
        raise UsageError(f"{text!r} is not a size", mend="write 20GiB, 512MiB or a number of bytes")
    if found[3] and found[3].upper() == "IB" and not found[2]:
        raise UsageError(f"{text!r} has no unit before iB", mend="write 20GiB, 512MiB or a number of bytes")
    shift = _UNITS[found[2].upper()]
    whole, _, fraction = found[1].partition(".")
    nbytes = int(whole) << shift
    if fraction:
        nbytes += (int(fraction) << shift) // 10 ** len(fraction)
    if nbytes >= _MOST_BYTES:
        raise UsageError(f"{text!r} is more than any machine has")
    return nbytes


def parse_layers(text: str) -> frozenset[str]:
    """The labels of layers: `0-3` is blocks 0, 1, 2 and 3 and nothing else; `embedding,0-3,head` names others too.

    Raises:
        UsageError: it is no such list, a range runs backwards, or a number is 100,000 or more.
    """
    labels: set[str] = set()
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?|([a-z][a-z0-9_.]*)", part.strip(), re.ASCII)
        if found is None:
            raise UsageError(f"{part!r} is no layer", mend="write 0-3, or embedding,0-3")
        if found[3] is not None:
            labels.add(found[3])
            continue
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < _MOST_LAYERS:
            raise UsageError(f"{part!r} is no range of layers", mend="write the lower number first, as in 0-3")
        labels.update(str(number) for number in range(first, last + 1))
    return frozenset(labels)


def parse_seconds(text: str) -> int:
    """A time span in seconds: `7d`, `12h`, `30m`, `90s` or `2w`.

    Raises:
        UsageError: it is no such thing, or 10,000 weeks or more.
    """
    found = re.fullmatch(r"(\d{1,9})([smhdw])", text.strip(), re.ASCII | re.IGNORECASE)
    if found is None:
        raise UsageError(f"{text!r} is no time span", mend="write 7d, 12h, 30m or 90s")
    seconds = int(found[1]) * _SECONDS[found[2].lower()]
    if seconds >= _MOST_SECONDS:
        raise UsageError(f"{text!r} is longer than anything is kept")
    return seconds
