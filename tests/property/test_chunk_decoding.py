"""Arbitrary bytes are what was encoded, or CorruptError, and nothing else."""

from __future__ import annotations

import contextlib
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.chunks import objects, pack, sealing
from checkpoint.chunks.keys import MasterKey
from checkpoint.chunks.pack import Head, Table
from checkpoint.chunks.sealing import Cipher, Envelope, Kind, Sealer
from checkpoint.errors import CorruptError

MASTER = MasterKey(secret=bytes(range(32)))
OPEN = Envelope(kind=Kind.PACK, cipher=Cipher.NONE, id=bytes(16), data_key=bytes(32), digest_key=bytes(32))
Sizes = st.integers(1, 4 << 20)


@st.composite
def table_rows(draw: st.DrawFn) -> bytes:
    sizes = draw(st.lists(Sizes, max_size=20))
    return b"".join(
        Head(nbytes + 16, nbytes, draw(st.sampled_from([pack.STORED, pack.ZSTD, pack.LOST])), bytes(32)).encoded()
        for nbytes in sizes
    )


@given(st.binary(max_size=100))
def test_heads(content: bytes) -> None:
    with contextlib.suppress(CorruptError):
        head = pack.decode_head(content, "p")
        assert head.encoded() == content[: pack.HEAD_BYTES]
        assert head.nbytes <= pack.MOST_CHUNK_BYTES
        assert head.sealed_nbytes <= pack.MOST_CHUNK_BYTES + 48


@given(st.binary(max_size=300) | table_rows(), st.none() | st.integers(0, 1 << 63))
def test_tables(rows: bytes, nbytes: int | None) -> None:
    with contextlib.suppress(CorruptError):
        table = Table.of(rows, "p", nbytes)
        assert b"".join(head.encoded() for head in table) == rows
        assert [table[number] for number in range(len(table))] == list(table)
        assert table.offsets[0] == pack.START
        assert table.offsets[-1] <= table.pack_nbytes
        for nbytes in (0, table.pack_nbytes, table.offsets[-1] - 1):
            cut = pack.within(rows, nbytes)
            assert rows.startswith(cut)
            assert cut == b"" or Table.of(cut, "p").offsets[-1] <= nbytes


@given(table_rows())
def test_indexes(rows: bytes) -> None:
    table = Table.of(rows, "p")
    encoded = pack.encode_index(OPEN, table)
    assert pack.decode_index(OPEN, encoded, "p") == table
    for other in (encoded[:-1], encoded + b"\0", encoded[:20] + b"\1" + encoded[21:]):
        with pytest.raises(CorruptError):
            pack.decode_index(OPEN, other, "p")


@given(st.binary(max_size=200), st.integers(0, 1 << 64), st.integers(0, 1 << 32), st.binary(max_size=200))
def test_indexes_of_those_who_can_seal(rows: bytes, nbytes: int, count: int, junk: bytes) -> None:
    front = struct.pack("<8s16sQI4x", b"WFSINDX1", bytes(16), nbytes % (1 << 64), count % (1 << 32))
    sealed = OPEN.sealer("index").seal(bytes(12), rows, front)
    for content in (front + bytes(12) + sealed, junk):
        with contextlib.suppress(CorruptError):
            assert pack.decode_index(OPEN, content, "p").rows == rows


@given(st.binary(max_size=500), st.integers(0, 500))
def test_walking(content: bytes, at: int) -> None:
    padded = bytes(pack.START) + content
    rows, end = pack.heads(lambda at, count: padded[at : at + count], "p")
    assert end == Table.of(rows, "p").offsets[-1]


@given(st.binary(max_size=300))
def test_envelopes(content: bytes) -> None:
    for master in (None, MASTER):
        with pytest.raises(CorruptError):
            sealing.unwrapped(content, Kind.PACK, master, "p")
        with pytest.raises(CorruptError):
            pack.decode_start(content, master, "p")
        with pytest.raises(CorruptError):
            objects.open_(master, bytes(32), content, b"", "p")


@given(st.sampled_from(Kind), st.integers(0, 255), st.binary(min_size=8, max_size=8), st.booleans())
def test_envelopes_whose_check_is_right(kind: Kind, cipher: int, key_id: bytes, is_ours: bool) -> None:
    front = struct.pack("<8sBB6x16s8s", b"WFSSEAL1", kind, cipher, bytes(16), MASTER.id if is_ours else key_id)
    content = front + bytes(12 + 80)
    content += sealing._check(content)
    for master in (None, MASTER):
        with pytest.raises(CorruptError):
            sealing.unwrapped(content, Kind.PACK, master, "p")


@given(st.binary(max_size=300), st.sampled_from([pack.STORED, pack.ZSTD]), st.integers(1, 400))
def test_expanding(payload: bytes, method: int, nbytes: int) -> None:
    for content in (payload, zstandard.compress(payload), zstandard.compress(payload)[:-1]):
        with contextlib.suppress(CorruptError):
            assert len(pack.expand(Head(len(content) + 16, nbytes, method, bytes(32)), content, "p")) == nbytes


def test_what_claims_to_be_large_is_not_expanded() -> None:
    bomb = zstandard.compress(bytes(1 << 28))
    with pytest.raises(CorruptError, match="another length"):
        pack.expand(Head(len(bomb) + 16, 4096, pack.ZSTD, bytes(32)), bomb, "p")


@given(st.binary(max_size=200), st.binary(max_size=50), st.sampled_from(Cipher), st.data())
def test_what_is_sealed_is_opened_or_not_at_all(
    content: bytes, bound: bytes, cipher: Cipher, data: st.DataObject
) -> None:
    sealer = Sealer(cipher, bytes(range(32)))
    sealed, nonce = sealer.seal(bytes(12), content, bound), bytes(12)
    assert len(sealed) == len(content) + sealing.TAG_BYTES
    assert sealer.open(nonce, sealed, bound, "p") == content
    at = data.draw(st.integers(0, len(sealed) - 1))
    flipped = sealed[:at] + bytes([sealed[at] ^ 1 << data.draw(st.integers(0, 7))]) + sealed[at + 1 :]
    for other, other_nonce, other_bound in (
        (flipped, nonce, bound),
        (sealed[:at], nonce, bound),
        (sealed + b"\0", nonce, bound),
        (sealed, b"\1" + bytes(11), bound),
        (sealed, nonce, bound + b"\0"),
    ):
        with pytest.raises(CorruptError):
            sealer.open(other_nonce, other, other_bound, "p")
    with pytest.raises(CorruptError):
        Sealer(cipher, bytes(32)).open(nonce, sealed, bound, "p")


@pytest.mark.parametrize("master", [None, MASTER])
def test_objects_are_bound(master: MasterKey | None) -> None:
    sealed = objects.seal(master, bytes(32), b"recipes", b"warm 1")
    assert objects.open_(master, bytes(32), sealed, b"warm 1", "p") == b"recipes"
    with pytest.raises(CorruptError):
        objects.open_(master, bytes(32), sealed, b"warm 2", "p")
    with pytest.raises(CorruptError, match="another store"):
        objects.open_(master, bytes([1] * 32), sealed, b"warm 1", "p")
    with pytest.raises(CorruptError, match="encrypted"):
        objects.open_(MASTER if master is None else None, bytes(32), sealed, b"warm 1", "p")


def test_objects_get_another_key() -> None:
    new, later = MasterKey(secret=bytes(range(2, 34))), MasterKey(secret=bytes(32))
    sealed = objects.seal(MASTER, bytes(32), b"recipes", b"warm 1")
    both = objects.opening_with_both(sealed, MASTER, new, "p")
    assert objects.opening_with_both(both, MASTER, new, "p") == both
    changed = objects.opening_with_one(both, new, "p")
    assert changed.endswith(sealed[sealing.ENVELOPE_BYTES :])
    assert len(changed) == len(sealed)
    assert objects.opening_with_both(changed, MASTER, new, "p") == changed
    # What was interrupted with another key is not in the way.
    third = objects.opening_with_both(both, new, later, "p")
    for content, opens in ((sealed, {MASTER}), (both, {MASTER, new}), (changed, {new}), (third, {new, later})):
        for master in (MASTER, new, later, None):
            if master in opens:
                assert objects.open_(master, bytes(32), content, b"warm 1", "p") == b"recipes"
            else:
                with pytest.raises(CorruptError):
                    objects.open_(master, bytes(32), content, b"warm 1", "p")
    for broken in (sealed[1:], sealed[: sealing.ENVELOPE_BYTES - 1], b""):
        with pytest.raises(CorruptError):
            objects.opening_with_both(broken, MASTER, new, "p")
    with pytest.raises(CorruptError):
        objects.opening_with_both(sealed, new, later, "p")
    with pytest.raises(CorruptError):
        objects.opening_with_one(sealed, new, "p")


def test_a_key_is_wrapped_with_another_one() -> None:
    new = MasterKey(secret=bytes(range(2, 34)))
    wrapped = Envelope.new(Kind.STORE, MASTER, bytes(32)).wrapped(MASTER)
    changed = sealing.rewrapped(wrapped, Kind.STORE, MASTER, new, "p")
    assert sealing.unwrapped(changed, Kind.STORE, new, "p").digest_key == bytes(32)
    assert sealing.rewrapped(changed, Kind.STORE, MASTER, new, "p") == changed
    with pytest.raises(CorruptError):
        sealing.rewrapped(wrapped, Kind.STORE, new, MasterKey(secret=bytes(32)), "p")
    with pytest.raises(CorruptError):
        sealing.rewrapped(wrapped, Kind.PACK, MASTER, new, "p")


def test_processors_without_instructions_for_it_use_chacha(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object, **__: object) -> None:
        raise FileNotFoundError

    assert sealing.preferred() in (Cipher.AES_256_GCM, Cipher.CHACHA20_POLY1305)
    sealing.preferred.cache_clear()
    monkeypatch.setattr("builtins.open", unreadable)
    assert sealing.preferred() is Cipher.CHACHA20_POLY1305
    monkeypatch.undo()
    sealing.preferred.cache_clear()
