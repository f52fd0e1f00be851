"""Whatever bytes a manifest has, its reader gives a manifest, CorruptError or MisfitError, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import blake3
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from checkpoint.errors import CorruptError, MisfitError
from checkpoint.manifest import VERSION, ImageFile, Manifest, Mount, Weight, decode, encode
from tests.helpers.snapshots import FINGERPRINT

DIGEST = "ab" * 32
WHOLE = Manifest(
    name="warm",
    id="0" * 32,
    created_ns=1,
    root_pid=7,
    pids=[7, 8],
    command=["serve", "--model", "/models/ll\udcffama", "ü"],
    cuda_pids=[8],
    stdio=["/dev/null"],
    listeners=["0.0.0.0:8000"],
    cwd="/",
    mount=Mount(mountpoint="/models", source="/srv/models"),
    fingerprint=FINGERPRINT,
    weights=[
        Weight(path="llama/one.safetensors", mountpoint="/models", nbytes=5, blake3=DIGEST),
        Weight(path="/srv/two.gguf", mountpoint=None, nbytes=0, blake3=DIGEST),
    ],
    files=[ImageFile(name="pages-1.img", nbytes=9, blake3=DIGEST)],
    phases={"dump": 0.5},
    criu_options={"shell-job": True, "external": ["mnt[]"]},
)
CONTENT = encode(WHOLE)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def sealed(inner: bytes) -> bytes:
    """A manifest's file around any bytes, with the digest that belongs to them."""
    return b'{"blake3": "%s", "manifest": %s}\n' % (blake3.blake3(inner).hexdigest().encode(), inner)


def read(content: bytes) -> Manifest | None:
    try:
        return decode(content, "/store/warm/manifest.json")
    except (CorruptError, MisfitError) as e:
        assert e.path == "/store/warm/manifest.json"
        assert e.exit_code in (3, 4)
        return None


def test_what_was_written_is_read() -> None:
    assert decode(CONTENT, "") == WHOLE
    assert json.loads(CONTENT)["manifest"]["name"] == "warm"
    assert "\\udcff" in CONTENT.decode("ascii")


@settings(max_examples=500, deadline=None)
@given(content=st.binary(max_size=300))
@example(content=b"")
def test_any_bytes(content: bytes) -> None:
    assert read(content) is None


@settings(max_examples=500, deadline=None)
@given(inner=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
@example(inner=b"[" * 100_000)
@example(inner=b'{"a":' * 50_000)
@example(inner=b"9" * 5000)
@example(inner=b'{"version": 1e999}')
@example(inner=b'{"version": 2}')
@example(inner=b'{"version": true}')
@example(inner=b"\xff\xfe\x00")
def test_any_document_with_its_digest(inner: bytes) -> None:
    assert read(sealed(inner)) is None


@settings(max_examples=1500, deadline=None)
@given(data=st.data(), value=JSON)
def test_any_value_anywhere(data: st.DataObject, value: Any) -> None:
    document = msgspec.to_builtins(WHOLE)
    place: Any = document
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    found = read(sealed(json.dumps(document).encode()))
    if found is not None:  # and can be written again
        assert decode(encode(found), "") == found


@given(at=st.integers(0, len(CONTENT) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(at: int, bit: int) -> None:
    content = bytearray(CONTENT)
    content[at] ^= 1 << bit
    with pytest.raises(CorruptError):
        decode(bytes(content), "")


@given(length=st.integers(0, len(CONTENT) - 1), more=st.binary(min_size=1, max_size=9))
def test_any_other_length_is_found(length: int, more: bytes) -> None:
    for content in (CONTENT[:length], CONTENT + more, more + CONTENT):
        with pytest.raises(CorruptError):
            decode(content, "")


BAD_PATHS = ["", ".", "..", "../x", "a/../b", "a//b", "a/", "./a", "a/.", "a\0b"]


@pytest.mark.parametrize(
    "change",
    [
        *({"name": name} for name in ("", "..", ".x", "a/b", "-x", "a" * 129, "a\n", "ä")),
        *(
            {"files": [ImageFile(name=name, nbytes=0, blake3=DIGEST)]}
            for name in ("", "..", ".", ".x", "a/b", "/etc/passwd", "-x", "a\0", "a\n", "x" * 256, "\udcff")
        ),
        {"files": [ImageFile(name="a", nbytes=0, blake3=DIGEST)] * 2},
        {"files": [ImageFile(name="a", nbytes=-1, blake3=DIGEST)]},
        {"files": [ImageFile(name="a", nbytes=0, blake3="AB" * 32)]},
        {"files": [ImageFile(name="a", nbytes=0, blake3=DIGEST + "\n")]},
        *(
            {"weights": [Weight(path=path, mountpoint="/models", nbytes=0, blake3=DIGEST)]}
            for path in [*BAD_PATHS, "/etc/passwd"]
        ),
        *(
            {"weights": [Weight(path=path, mountpoint=None, nbytes=0, blake3=DIGEST)]}
            for path in [*BAD_PATHS, "relative", "//x", "/a/../b", "/"]
        ),
        *(
            {"weights": [Weight(path="x", mountpoint=path, nbytes=0, blake3=DIGEST)]}
            for path in [*BAD_PATHS, "relative", "//x", "/a/../b"]
        ),
        *({"mount": Mount(mountpoint=path, source="/")} for path in [*BAD_PATHS, "relative", "/../x"]),
        {"id": "0" * 31},
        {"id": "../../../../../../../../../../x"},
        {"root_pid": -1},
        {"created_ns": 1 << 63},
    ],
    ids=repr,
)
def test_hostile_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CorruptError):
        decode(encode(msgspec.structs.replace(WHOLE, **change)), "")


def test_a_newer_one_is_a_misfit_and_an_unknown_key_is_not_overlooked() -> None:
    document = msgspec.to_builtins(WHOLE)
    newer = json.dumps({**document, "version": VERSION + 1, "chunks": []}).encode()
    with pytest.raises(MisfitError, match="newer"):
        decode(sealed(newer), "")
    with pytest.raises(CorruptError, match="chunks"):
        decode(sealed(json.dumps({**document, "chunks": []}).encode()), "")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "Infinity", "NaN", "1" + "0" * 400])
def test_numbers_beyond_all_bounds_are_refused(number: str) -> None:
    inner = json.dumps(msgspec.to_builtins(WHOLE)).replace("0.5", number).encode()
    assert read(sealed(inner)) is None


def test_numbers_that_json_does_not_have_are_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode(msgspec.structs.replace(WHOLE, phases={"dump": float("nan")}))
