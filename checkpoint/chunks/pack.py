"""What a pack and its index look like on the disk.

A pack holds chunks, in the order in which they came, and is never changed but for its envelope:

    envelope | zeros to 4096 | second envelope, or zeros | zeros to 8192 | record... | end
    record      sealed nbytes 4 | nbytes 4 | method 1 | zeros 3 | id 32 | sealed
    end         a record of no bytes, whose method is END; sealed in it is the BLAKE3 of all heads before it

A record's *head* (all but what is sealed) is bound to what is sealed, and its number is the nonce: no record passes for
another, nor at another place, and no pack without its end for a whole one. The second envelope is there while the
master key changes, when the pack opens with the old and the new one.

An index is what the heads say, so that a pack need not be walked through; it can be made from the pack anew:

    magic 8 | pack's id 16 | pack's nbytes 8 | count 4 | zeros 4 | nonce 12 | sealed heads

Nothing here reads or writes a file, and every decoder takes arbitrary bytes.
"""

from __future__ import annotations

import os
import struct
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import blake3
import zstandard

from checkpoint.chunks.keys import MasterKey
from checkpoint.chunks.sealing import (
    ENVELOPE_BYTES,
    NONCE_BYTES,
    TAG_BYTES,
    Envelope,
    Kind,
    Sealer,
    key_id_of,
    unwrapped,
)
from checkpoint.errors import CorruptError

SLOT_BYTES: Final = 4096
"""An envelope's own block, so that writing one never tears the other."""
START: Final = 2 * SLOT_BYTES
"""Where the first record stands."""

MOST_CHUNK_BYTES: Final = 16 << 20
MOST_CHUNKS: Final = 1 << 20
LEVEL: Final = 1
"""Of zstd. What it stores of each byte of a Python process's memory, and GB/s a core to compress: level -5 0.37 and
0.37, -1 0.27 and 0.34, 1 0.26 and 0.29, 3 0.24 and 0.18, 6 0.23 and 0.05; decompressing differs little
(`tools/bench/packs.py`)."""

STORED: Final = 0
ZSTD: Final = 1
LOST: Final = 254
"""In an index alone: a record that was damaged when the index was made anew."""
END: Final = 255

_HEAD: Final = struct.Struct("<IIB3x32s")
HEAD_BYTES: Final = _HEAD.size
_NO_ID: Final = bytes(32)
_END_DIGEST_BYTES: Final = 32
END_BYTES: Final = HEAD_BYTES + _END_DIGEST_BYTES + TAG_BYTES
"""Of the end of a pack, its head included."""
_INDEX: Final = struct.Struct("<8s16sQI4x")
_INDEX_MAGIC: Final = b"WFSINDX1"
MOST_INDEX_BYTES: Final = _INDEX.size + NONCE_BYTES + MOST_CHUNKS * HEAD_BYTES + TAG_BYTES
_HAS_MANY: Final = "multi_decompress_to_buffer" in zstandard.backend_features
_local = threading.local()


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before a sealed chunk.

    Attributes:
        sealed_nbytes: of what follows it.
        nbytes: of the chunk.
        method: STORED or ZSTD; LOST or END where it is no chunk.
        id: the chunk's: its keyed BLAKE3, 32 bytes.
    """

    sealed_nbytes: int
    nbytes: int
    method: int
    id: bytes

    def encoded(self) -> bytes:
        """Its `HEAD_BYTES`."""
        return _HEAD.pack(self.sealed_nbytes, self.nbytes, self.method, self.id)

    def lost(self) -> Head:
        """One for an index, of a record as long whose chunk is lost."""
        return Head(self.sealed_nbytes, self.nbytes, LOST, _NO_ID)


def decode_head(content: bytes, path: str, at: int = 0) -> Head:
    """The head at an offset.

    Raises:
        CorruptError: there is none.
    """
    if len(content) < at + HEAD_BYTES:
        raise _corrupt("ends within a chunk", path)
    sealed_nbytes, nbytes, method, id_ = _HEAD.unpack_from(content, at)
    if method == END:
        fits = sealed_nbytes == END_BYTES - HEAD_BYTES and nbytes == 0
    else:
        fits = (
            0 < nbytes <= MOST_CHUNK_BYTES
            and TAG_BYTES < sealed_nbytes <= nbytes + TAG_BYTES
            and (method in (ZSTD, LOST) or (method == STORED and sealed_nbytes == nbytes + TAG_BYTES))
        )
    if not fits or content[at + 9 : at + 12] != b"\0\0\0":
        raise _corrupt("names a chunk that can't be", path)
    return Head(sealed_nbytes, nbytes, method, id_)


@dataclass(frozen=True, slots=True)
class Table:
    """Every record of a pack.

    Attributes:
        rows: the heads one after another, in the order of the pack, without its end.
        offsets: of each head in the pack; the last one is that of the end.
        pack_nbytes: the size of the pack.
    """

    rows: bytes
    offsets: array[int]
    pack_nbytes: int

    @classmethod
    def of(cls, rows: bytes, path: str, pack_nbytes: int | None = None) -> Table:
        """The table that follows from heads.

        Args:
            rows: the heads, without the end.
            path: where they were read, for errors.
            pack_nbytes: the size of the pack; None where it is whole.

        Raises:
            CorruptError: they are none.
        """
        if len(rows) % HEAD_BYTES or len(rows) > MOST_CHUNKS * HEAD_BYTES:
            raise _corrupt("names a number of chunks that can't be", path)
        sizes = []
        for at in range(0, len(rows), HEAD_BYTES):
            head = decode_head(rows, path, at)
            if head.method == END:
                raise _corrupt("names a chunk that can't be", path)
            sizes.append(HEAD_BYTES + head.sealed_nbytes)
        offsets = array("Q", accumulate(sizes, initial=START))
        nbytes = offsets[-1] + END_BYTES if pack_nbytes is None else pack_nbytes
        if nbytes < offsets[-1]:
            raise _corrupt("names chunks beyond its end", path)
        return cls(rows, offsets, nbytes)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[Head]:
        return (Head(*fields) for fields in _HEAD.iter_unpack(self.rows))

    def __getitem__(self, number: int) -> Head:
        return Head(*_HEAD.unpack_from(self.rows, number * HEAD_BYTES))


def heads(read: Callable[[int, int], bytes], path: str) -> tuple[bytes, int]:
    """The heads of a pack, one after another, and where the next one stood, be it the end or none.

    They are not authentic until `require_end` or `open_chunk` says so.

    Args:
        read: gives a number of bytes at an offset of the pack, fewer where it ends.
        path: of the pack, for errors.
    """
    rows, at = bytearray(), START
    while len(rows) < MOST_CHUNKS * HEAD_BYTES:
        try:
            head = decode_head(read(at, HEAD_BYTES), path)
        except CorruptError:
            break
        if head.method in (END, LOST):
            break
        rows += head.encoded()
        at += HEAD_BYTES + head.sealed_nbytes
    return bytes(rows), at


def within(rows: bytes, pack_nbytes: int) -> bytes:
    """Those heads whose records are within a pack of some size."""
    at, count = START, 0
    for sealed_nbytes, _, _, _ in _HEAD.iter_unpack(rows):
        at += HEAD_BYTES + sealed_nbytes
        if at > pack_nbytes:
            break
        count += 1
    return rows[: count * HEAD_BYTES]


def digest(digest_key: bytes, content: bytes | memoryview) -> bytes:
    """A chunk's id: says nothing of it to those who lack the key."""
    return blake3.blake3(content, key=digest_key).digest()


def compressed(content: memoryview) -> tuple[int, bytes | memoryview]:
    """The method and the bytes to seal: those given where compression gains less than 1 in 32."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(
            level=LEVEL, write_checksum=False, write_content_size=True, write_dict_id=False
        )
    smaller = _local.compressor.compress(content)
    return (ZSTD, smaller) if len(smaller) < len(content) - len(content) // 32 else (STORED, content)


def seal_chunk(sealer: Sealer, number: int, head: Head, payload: bytes | memoryview) -> bytes:
    """What follows the head of a record; see `open_chunk`."""
    return sealer.seal(_nonce(number), payload, head.encoded())


def open_chunk(sealer: Sealer, number: int, head: Head, sealed: bytes | memoryview, path: str) -> bytes:
    """A chunk, compressed as its head says and no other than was sealed.

    Args:
        sealer: the pack's, for chunks.
        number: of the record in the pack.
        head: of the record.
        sealed: what follows the head.
        path: of the pack, for errors.

    Raises:
        CorruptError: any of them is not what it was.
    """
    return sealer.open(_nonce(number), sealed, head.encoded(), path)


def expand(head: Head, payload: bytes, path: str) -> bytes:
    """A chunk's bytes, of what `open_chunk` gave.

    Raises:
        CorruptError: it has another length than its head says.
    """
    if head.method == ZSTD:
        try:
            if zstandard.frame_content_size(payload) != head.nbytes:
                raise _corrupt("holds a chunk of another length", path)
            payload = _decompressor().decompress(payload)
        except zstandard.ZstdError as e:
            raise _corrupt(f"holds a chunk that can't be decompressed: {e}", path) from e
    if len(payload) != head.nbytes:
        raise _corrupt("holds a chunk of another length", path)
    return payload


def expand_all(heads_: Sequence[Head], payloads: Sequence[bytes], path: str) -> list[Any]:
    """Many chunks at once, as `expand`: in one call, where zstd has it, that keeps no other thread waiting."""
    if _HAS_MANY:
        numbers = [number for number, head in enumerate(heads_) if head.method == ZSTD]
        found: list[Any] = list(payloads)
        frames: list[bytes | bytearray | memoryview] = [payloads[number] for number in numbers]
        sizes = [heads_[number].nbytes for number in numbers]
        try:
            if [zstandard.frame_content_size(frame) for frame in frames] != sizes:
                raise _corrupt("holds a chunk of another length", path)
            if frames:
                packed = struct.pack(f"={len(sizes)}Q", *sizes)
                many = _decompressor().multi_decompress_to_buffer(frames, decompressed_sizes=packed)
                for place, number in enumerate(numbers):
                    found[number] = many[place]
        except zstandard.ZstdError as e:
            raise _corrupt(f"holds a chunk that can't be decompressed: {e}", path) from e
        if [len(one) for one in found] != [head.nbytes for head in heads_]:
            raise _corrupt("holds a chunk of another length", path)
        return found
    return [expand(head, payload, path) for head, payload in zip(heads_, payloads, strict=True)]


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's own."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    found: zstandard.ZstdDecompressor = _local.decompressor
    return found


def encode_end(sealer: Sealer, rows: bytes) -> bytes:
    """The end of a pack with these heads."""
    head = Head(END_BYTES - HEAD_BYTES, 0, END, _NO_ID).encoded()
    return head + sealer.seal(_nonce(len(rows) // HEAD_BYTES), blake3.blake3(rows).digest(_END_DIGEST_BYTES), head)


def require_end(sealer: Sealer, rows: bytes, content: bytes, path: str) -> None:
    """Refuse a pack that does not end as one with these heads does: with it, every head is known to be authentic.

    Raises:
        CorruptError: it does not.
    """
    if decode_head(content, path).method != END or len(content) != END_BYTES:
        raise _corrupt("does not end as a pack does", path)
    number = len(rows) // HEAD_BYTES
    said = sealer.open(_nonce(number), memoryview(content)[HEAD_BYTES:], content[:HEAD_BYTES], path)
    if said != blake3.blake3(rows).digest(_END_DIGEST_BYTES):
        raise _corrupt("holds other chunks than were written", path)


def encode_index(envelope: Envelope, table: Table) -> bytes:
    """The index of a pack."""
    front = _INDEX.pack(_INDEX_MAGIC, envelope.id, table.pack_nbytes, len(table))
    nonce = os.urandom(NONCE_BYTES)
    return front + nonce + envelope.sealer("index").seal(nonce, table.rows, front)


def decode_index(envelope: Envelope, content: bytes, path: str) -> Table:
    """The table that an index holds.

    Args:
        envelope: of the pack.
        content: the whole index.
        path: where it was read, for errors.

    Raises:
        CorruptError: it is not the index of this pack.
    """
    if len(content) < _INDEX.size + NONCE_BYTES + TAG_BYTES:
        raise _corrupt("is too short for an index", path)
    magic, id_, pack_nbytes, count = _INDEX.unpack_from(content)
    if magic != _INDEX_MAGIC or id_ != envelope.id:
        raise _corrupt("is not the index of its pack", path)
    nonce, sealed = content[_INDEX.size :][:NONCE_BYTES], memoryview(content)[_INDEX.size + NONCE_BYTES :]
    table = Table.of(envelope.sealer("index").open(nonce, sealed, content[: _INDEX.size], path), path, pack_nbytes)
    if len(table) != count:
        raise _corrupt("names another number of chunks than it holds", path)
    return table


def encode_start(envelope: Envelope, master: MasterKey | None) -> bytes:
    """What a pack begins with, up to `START`."""
    return envelope.wrapped(master).ljust(START, b"\0")


def decode_start(content: bytes, master: MasterKey | None, path: str) -> Envelope:
    """The envelope of a pack, from its first `START` bytes.

    Raises:
        CorruptError: there is none that this key opens.
    """
    slots = [content[at : at + ENVELOPE_BYTES] for at in (0, SLOT_BYTES)]
    wanted = None if master is None else master.id
    found = [slot for slot in slots if key_id_of(slot) is not None]
    fitting = [slot for slot in found if key_id_of(slot) == wanted]
    return unwrapped((fitting or found or slots)[0], Kind.PACK, master, path)


def slot_to_fill(content: bytes, old: MasterKey, new: MasterKey) -> int | None:
    """Where a second envelope goes in the first `START` bytes of a pack; None where there is one of the new key."""
    ids = [key_id_of(content[at : at + ENVELOPE_BYTES]) for at in (0, SLOT_BYTES)]
    if new.id in ids:
        return None
    return SLOT_BYTES if ids[0] == old.id else 0


def slots_to_clear(content: bytes, new: MasterKey) -> list[int]:
    """Which slots hold anything but the envelope of the new key; none where that is missing."""
    slots = {at: content[at : at + ENVELOPE_BYTES] for at in (0, SLOT_BYTES)}
    if new.id not in map(key_id_of, slots.values()):
        return []
    return [at for at, slot in slots.items() if key_id_of(slot) != new.id and any(slot)]


def _nonce(number: int) -> bytes:
    return number.to_bytes(NONCE_BYTES, "little")


def _corrupt(message: str, path: str) -> CorruptError:
    return CorruptError(message, path=path, mend="make the snapshot anew")
