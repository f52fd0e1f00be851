"""Sealing: what was sealed is opened unchanged, under the same key and bound to the same facts, or not at all.

Whatever is written has a random data key of its own. That key lies in an *envelope* in front of it, wrapped by the
master key, so a new master key changes envelopes and nothing else. The store's digest key lies there as well, which
ties all that a store holds to it, and survives in every pack.

    envelope    magic 8 | kind 1 | cipher 1 | zeros 6 | id 16 | master's id 8 | nonce 12 | wrapped 64 + 16 | check 16

Everything up to the key's id is bound to what is wrapped. The check (BLAKE3) tells damage from a wrong key.

Without encryption the same bytes are written, but keys are in the clear and a BLAKE3 stands where the tag of AES-GCM
would: that finds damage and stops no forger. Nonces of random 96 bits are used for wrapping and for indexes alone: 2^32
of them per key are safe (NIST SP 800-38D, 8.3). Chunks have counted ones, under a key used for one pack.
"""

from __future__ import annotations

import enum
import functools
import hmac
import os
import secrets
import struct
from dataclasses import dataclass, field
from typing import Final

import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from checkpoint.chunks.keys import KEY_BYTES, MasterKey, derived
from checkpoint.errors import CorruptError

TAG_BYTES: Final = 16
NONCE_BYTES: Final = 12
ID_BYTES: Final = 16

_MAGIC: Final = b"WFSSEAL1"
_BOUND: Final = struct.Struct("<8sBB6x16s8s")
_CHECK_BYTES: Final = 16
_SECRETS_BYTES: Final = 2 * KEY_BYTES
ENVELOPE_BYTES: Final = _BOUND.size + NONCE_BYTES + _SECRETS_BYTES + TAG_BYTES + _CHECK_BYTES
_NO_KEY_ID: Final = bytes(8)
_ANEW: Final = "make the snapshot anew"


class Kind(enum.IntEnum):
    """What an envelope belongs to; one kind never passes for another."""

    STORE = 1
    PACK = 2
    OBJECT = 3


class Cipher(enum.IntEnum):
    """How content is sealed; the numbers are those on the disk."""

    NONE = 0
    AES_256_GCM = 1
    CHACHA20_POLY1305 = 2


@functools.cache
def preferred() -> Cipher:
    """The faster one here: AES-GCM where the processor has instructions for it, else ChaCha20-Poly1305.

    On an AMD EPYC, GB/s a core for 256 KiB: AES-GCM 2.2, ChaCha20-Poly1305 1.7 (`tools/bench/packs.py`).
    """
    try:
        with open("/proc/cpuinfo") as content:
            words = set(content.read().split())
    except OSError:
        words = set()
    return Cipher.AES_256_GCM if "aes" in words else Cipher.CHACHA20_POLY1305


class Sealer:
    """Seals and opens under one key. Any thread may use it; content of some size is worked on without the GIL.

    Args:
        cipher: how.
        key: 32 bytes.
    """

    def __init__(self, cipher: Cipher, key: bytes) -> None:
        self._aead: AESGCM | ChaCha20Poly1305 | _Unencrypted
        if cipher is Cipher.AES_256_GCM:
            self._aead = AESGCM(key)
        elif cipher is Cipher.CHACHA20_POLY1305:
            self._aead = ChaCha20Poly1305(key)
        else:
            self._aead = _Unencrypted(key)

    def seal(self, nonce: bytes, content: bytes | memoryview, bound: bytes) -> bytes:
        """Seal; gives `TAG_BYTES` more than the content has.

        Args:
            nonce: 12 bytes, never the same twice under one key.
            content: what is sealed.
            bound: what must be given again to open it.
        """
        return self._aead.encrypt(nonce, content, bound)

    def open(self, nonce: bytes, sealed: bytes | memoryview, bound: bytes, path: str) -> bytes:
        """What was sealed.

        Args:
            nonce, bound: as they were given to `seal`.
            sealed: what `seal` gave.
            path: where it was read, for errors.

        Raises:
            CorruptError: any of them is not what it was.
        """
        try:
            return self._aead.decrypt(nonce, sealed, bound)
        except InvalidTag as e:
            raise _broken(path) from e


class _Unencrypted:
    """The methods of an AEAD that leaves content as it is, and finds damage."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def encrypt(self, nonce: bytes, content: bytes | memoryview, bound: bytes) -> bytes:
        return b"".join((content, self._tag(nonce, content, bound)))

    def decrypt(self, nonce: bytes, sealed: bytes | memoryview, bound: bytes) -> bytes:
        content = memoryview(sealed)[:-TAG_BYTES]
        if len(sealed) < TAG_BYTES or self._tag(nonce, content, bound) != sealed[-TAG_BYTES:]:
            raise InvalidTag
        return bytes(content)

    def _tag(self, nonce: bytes, content: bytes | memoryview, bound: bytes) -> bytes:
        hasher = blake3.blake3(nonce + len(bound).to_bytes(8, "little") + bound, key=self._key)
        return hasher.update(content).digest(TAG_BYTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """What stands in front of content that is sealed.

    Attributes:
        kind: what the content is.
        cipher: how it is sealed, and how these keys are wrapped.
        id: 16 bytes, of the pack or the object.
        data_key: the content's own; 32 bytes, not shown.
        digest_key: the store's, for the ids of chunks; 32 bytes, not shown.
    """

    kind: Kind
    cipher: Cipher
    id: bytes
    data_key: bytes = field(repr=False)
    digest_key: bytes = field(repr=False)

    @classmethod
    def new(cls, kind: Kind, master: MasterKey | None, digest_key: bytes) -> Envelope:
        """One with a random id and a random data key."""
        return cls(
            kind=kind,
            cipher=Cipher.NONE if master is None else preferred(),
            id=secrets.token_bytes(ID_BYTES),
            data_key=secrets.token_bytes(KEY_BYTES),
            digest_key=digest_key,
        )

    def sealer(self, purpose: str) -> Sealer:
        """Seals one kind of content under a key of its own."""
        return Sealer(self.cipher, derived(self.data_key, purpose))

    def wrapped(self, master: MasterKey | None) -> bytes:
        """The `ENVELOPE_BYTES` to write."""
        bound = _BOUND.pack(_MAGIC, self.kind, self.cipher, self.id, _NO_KEY_ID if master is None else master.id)
        nonce = os.urandom(NONCE_BYTES)
        sealed = _wrapping(self.cipher, master).seal(nonce, self.data_key + self.digest_key, bound)
        content = bound + nonce + sealed
        return content + _check(content)


def key_id_of(content: bytes) -> bytes | None:
    """The id of the master key an envelope is wrapped with, zeros where there is none; None where it is no envelope."""
    body = content[: ENVELOPE_BYTES - _CHECK_BYTES]
    if len(content) < ENVELOPE_BYTES or not hmac.compare_digest(_check(body), content[len(body) : ENVELOPE_BYTES]):
        return None
    magic, _, _, _, key_id = _BOUND.unpack_from(body)
    return bytes(key_id) if magic == _MAGIC else None


def unwrapped(content: bytes, kind: Kind, master: MasterKey | None, path: str) -> Envelope:
    """The envelope that bytes begin with.

    Args:
        content: at least `ENVELOPE_BYTES`.
        kind: the one it must be of.
        master: what it was wrapped with; None where nothing may be encrypted.
        path: where it was read, for errors.

    Raises:
        CorruptError: it is damaged, of another kind, or wrapped with another key, or one of both is not encrypted.
    """
    key_id = key_id_of(content)
    if key_id is None:
        raise CorruptError("does not begin as what is sealed does", path=path, mend=_ANEW)
    _, found_kind, found_cipher, found_id, _ = _BOUND.unpack_from(content)
    try:
        cipher = Cipher(found_cipher)
    except ValueError as e:
        raise CorruptError(f"is sealed in a way unknown here ({found_cipher})", path=path, mend=_ANEW) from e
    if found_kind != kind:
        raise CorruptError("is sealed as something else", path=path, mend=_ANEW)
    if master is None and cipher is not Cipher.NONE:
        raise CorruptError(f"is encrypted (key {key_id.hex()})", path=path, mend="give the key it was made with")
    if master is not None and cipher is Cipher.NONE:
        raise CorruptError("is not encrypted, though a key is given", path=path, mend="use --no-encrypt to trust it")
    if master is not None and key_id != master.id:
        raise CorruptError(
            f"is encrypted with the key {key_id.hex()}, not with this one, {master.id.hex()}",
            path=path,
            mend="give the key it was made with",
        )
    nonce, sealed = content[_BOUND.size :][:NONCE_BYTES], content[_BOUND.size + NONCE_BYTES :][: _SECRETS_BYTES + 16]
    keys = _wrapping(cipher, master).open(nonce, sealed, content[: _BOUND.size], path)
    return Envelope(kind=kind, cipher=cipher, id=found_id, data_key=keys[:KEY_BYTES], digest_key=keys[KEY_BYTES:])


def rewrapped(content: bytes, kind: Kind, old: MasterKey, new: MasterKey, path: str) -> bytes:
    """The same content under a new master key; unchanged where it has that already.

    Raises:
        CorruptError: it is damaged, or wrapped with neither.
    """
    if key_id_of(content) == new.id:
        unwrapped(content, kind, new, path)
        return content
    return unwrapped(content, kind, old, path).wrapped(new) + content[ENVELOPE_BYTES:]


def _wrapping(cipher: Cipher, master: MasterKey | None) -> Sealer:
    return Sealer(cipher, bytes(KEY_BYTES) if master is None else master.derived("wrapping"))


def _check(content: bytes) -> bytes:
    return blake3.blake3(content).digest(_CHECK_BYTES)


def _broken(path: str) -> CorruptError:
    return CorruptError("its bytes are not those that were sealed", path=path, mend=_ANEW)
