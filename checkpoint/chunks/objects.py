"""Objects that are sealed whole, as a snapshot's recipes are.

    envelope | second envelope, or nothing | sealed

The second envelope is there while the master key changes, when the object opens with the old and the new one.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Final

from checkpoint.chunks.keys import MasterKey
from checkpoint.chunks.sealing import ENVELOPE_BYTES, NONCE_BYTES, Envelope, Kind, key_id_of, unwrapped
from checkpoint.errors import CorruptError

_MOST_ENVELOPES: Final = 2
_ANEW: Final = "make the snapshot anew"


def seal(master: MasterKey | None, digest_key: bytes, content: bytes, bound: bytes) -> bytes:
    """An object to write.

    Args:
        master: None where nothing is encrypted.
        digest_key: of the store it belongs to.
        content: what is sealed.
        bound: what must be given again to open it, as the snapshot's name and id.
    """
    envelope = Envelope.new(Kind.OBJECT, master, digest_key)
    return envelope.wrapped(master) + envelope.sealer("object").seal(bytes(NONCE_BYTES), content, bound)


def open_(master: MasterKey | None, digest_key: bytes, content: bytes, bound: bytes, path: str) -> bytes:
    """What `seal` sealed.

    Raises:
        CorruptError: it is not what was written, is of another store or bound to something else, or the key is another.
    """
    envelope = envelope_of(content, master, path)
    if not hmac.compare_digest(envelope.digest_key, digest_key):
        raise CorruptError("belongs to another store", path=path, mend=_ANEW)
    return envelope.sealer("object").open(bytes(NONCE_BYTES), _parts(content)[1], bound, path)


def envelope_of(content: bytes, master: MasterKey | None, path: str) -> Envelope:
    """The envelope of an object.

    Raises:
        CorruptError: there is none that this key opens.
    """
    envelopes, _ = _parts(content)
    wanted = None if master is None else master.id
    fitting = [one for one in envelopes if key_id_of(one) == wanted]
    return unwrapped((fitting or envelopes or [content])[0], Kind.OBJECT, master, path)


def opening_with_both(content: bytes, old: MasterKey, new: MasterKey, path: str) -> bytes:
    """The same object, which the new key opens, and the old one where that did.

    Raises:
        CorruptError: neither opens it.
    """
    envelopes, sealed = _parts(content)
    kept = _of(envelopes, (old, new))
    if new.id not in map(key_id_of, kept):
        kept.append(envelope_of(content, old, path).wrapped(new))
    else:
        envelope_of(content, new, path)
    return b"".join(kept) + sealed


def opening_with_one(content: bytes, new: MasterKey, path: str) -> bytes:
    """The same object, which no other key opens.

    Raises:
        CorruptError: the new one does not.
    """
    envelope_of(content, new, path)
    envelopes, sealed = _parts(content)
    return b"".join(_of(envelopes, (new,))) + sealed


def _parts(content: bytes) -> tuple[list[bytes], bytes]:
    """The envelopes, or none, and what is sealed: those bytes do not pass an envelope's check."""
    envelopes: list[bytes] = []
    at = 0
    while len(envelopes) < _MOST_ENVELOPES and key_id_of(content[at : at + ENVELOPE_BYTES]) is not None:
        envelopes.append(content[at : at + ENVELOPE_BYTES])
        at += ENVELOPE_BYTES
    return envelopes, content[at:]


def _of(envelopes: Iterable[bytes], masters: Iterable[MasterKey]) -> list[bytes]:
    wanted = {master.id for master in masters}
    return [one for one in envelopes if key_id_of(one) in wanted]
