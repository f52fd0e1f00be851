"""Tensor names as file names.

A tensor may have any name JSON can spell; a Linux file name is 1 to 255 bytes without `/` and NUL, and not `.` or `..`.
"""

from __future__ import annotations

import hashlib
import itertools
import re

MAX_NAME_BYTES = 255
"""NAME_MAX of Linux, in bytes of UTF-8."""

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f/%\ud800-\udfff]")
"""Control characters are legal in a file name but break terminals and line-based tools; surrogates have no UTF-8."""

_WHOLE = {"": "%", ".": "%2E", "..": "%2E%2E"}
_DIGEST_BYTES = 16
_MARK = "%~"


def encode_name(name: str, suffix: str = "") -> str:
    """Spells a tensor's name as a file name.

    Percent-encodes the bytes of `/`, `%`, control characters and lone surrogates; the empty name is `%`. A result that
    would exceed `MAX_NAME_BYTES` is cut between characters of `name` and ends in `%~` and 32 hexadecimal digits of the
    full name's BLAKE2b. Two names give the same result only if those 128 bits collide: every other `%` is followed by a
    hexadecimal digit or the end.

    Args:
        name: any text, lone surrogates included.
        suffix: appended unencoded and counted in the limit, such as `.npy`; at most 100 bytes of plain file name.

    Returns:
        A file name of 1 to 255 bytes of UTF-8.
    """
    limit = MAX_NAME_BYTES - len(suffix.encode())
    encoded = _WHOLE.get(name) or _UNSAFE.sub(_percent, name)
    # A character takes at most 4 bytes, so a short name needs no encoding just to be measured.
    if len(encoded) * 4 > limit and len(encoded.encode()) > limit:
        encoded = _cut(name, limit)
    return encoded + suffix


def _cut(name: str, limit: int) -> str:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()
    room = limit - len(_MARK) - len(digest)
    # A character takes at least a byte, so no more than `room` of them fit.
    pieces = [_UNSAFE.sub(_percent, char) for char in name[:room]]
    ends = itertools.accumulate(len(piece.encode()) for piece in pieces)
    return "".join(piece for piece, end in zip(pieces, ends, strict=True) if end <= room) + _MARK + digest


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))
