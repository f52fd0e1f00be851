"""Where a master key comes from, and what is no key."""

from __future__ import annotations

import base64
import os
import time
from pathlib import Path

import pytest

from checkpoint.chunks import keys
from checkpoint.chunks.keys import MasterKey
from checkpoint.errors import CorruptError, MasterKeyError

SECRET = bytes(range(200, 232))


def written(path: Path, content: bytes = SECRET, mode: int = 0o600) -> str:
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_a_file(tmp_path: Path) -> None:
    path = written(tmp_path / "key")
    assert keys.from_file(path).secret == SECRET
    os.symlink(path, tmp_path / "link")  # as Kubernetes mounts a secret
    assert keys.from_file(str(tmp_path / "link")).secret == SECRET


@pytest.mark.parametrize("content", [b"", SECRET[:-1], SECRET + b"\n", SECRET.hex().encode()])
def test_a_file_of_another_size(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(MasterKeyError, match="32 raw bytes") as raised:
        keys.from_file(written(tmp_path / "key", content))
    assert raised.value.path == str(tmp_path / "key")
    assert raised.value.mend is not None
    assert "head -c 32 /dev/urandom" in raised.value.mend


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_file_that_others_may_read_or_write(tmp_path: Path, mode: int) -> None:
    with pytest.raises(MasterKeyError, match=f"mode {mode:04o}"):
        keys.from_file(written(tmp_path / "key", mode=mode))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name, why in (("none", "No such file"), ("fifo", "no regular file"), (".", "no regular file")):
        with pytest.raises(MasterKeyError, match=why):
            keys.from_file(str(tmp_path / name))


@pytest.mark.skipif(os.geteuid() != 0, reason="this machine lacks root rights for the tests")
def test_a_file_that_others_could_have_put_there(tmp_path: Path) -> None:
    path = written(tmp_path / "key")
    os.chown(path, 4321, -1)
    with pytest.raises(CorruptError, match="belongs to user 4321"):
        keys.from_file(path)
    os.chown(path, 0, -1)
    tmp_path.chmod(0o777)
    with pytest.raises(CorruptError, match="mode 0777"):
        keys.from_file(path)


@pytest.mark.parametrize("value", [SECRET, SECRET.hex().encode(), base64.b64encode(SECRET) + b"\n"])
def test_a_variable_is_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch, value: bytes) -> None:
    monkeypatch.setenv("WEIGHTFS_TEST_KEY", "set so that it is removed at the end")
    os.environb[b"WEIGHTFS_TEST_KEY"] = value
    assert keys.from_environment("WEIGHTFS_TEST_KEY").secret == SECRET
    with pytest.raises(MasterKeyError, match="WEIGHTFS_TEST_KEY"):
        keys.from_environment("WEIGHTFS_TEST_KEY")


@pytest.mark.parametrize("value", ["", "short", "zz" * 32, SECRET.hex()[:-2], "A" * 44, "A" * 10_000])
def test_a_variable_that_holds_no_key(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WEIGHTFS_TEST_KEY", value)
    with pytest.raises(MasterKeyError, match="is no key") as raised:
        keys.from_environment("WEIGHTFS_TEST_KEY")
    assert value == "" or value not in str(raised.value)


def test_a_command(tmp_path: Path) -> None:
    path = written(tmp_path / "a key")
    assert keys.from_command(f"cat '{path}'").secret == SECRET
    assert keys.from_command(f"echo {SECRET.hex()}").secret == SECRET
    assert keys.from_command(f"sh -c 'sleep 100 >/dev/null 2>&1 & base64 \"$0\"' '{path}'").secret == SECRET


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("", "is empty"),
        ("echo 'a", "can't be split"),
        ("/nonexistent/vault read", "can't be started"),
        ("echo nothing", "is no key"),
        ("sh -c 'echo permission denied >&2; exit 7'", "ended with 7: permission denied"),
    ],
)
def test_a_command_that_gives_none(command: str, why: str) -> None:
    with pytest.raises(MasterKeyError, match=why):
        keys.from_command(command)


def test_a_command_that_hangs_is_ended_with_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_COMMAND_S", 0.2)
    started = time.monotonic()
    with pytest.raises(MasterKeyError, match="printed no key within"):
        keys.from_command("sh -c 'sleep 100 & sleep 100'")
    assert time.monotonic() - started < 30


def test_nothing_shows_it() -> None:
    key = MasterKey(secret=SECRET)
    assert "secret" not in repr(key)
    assert len(key.id) == 8
    assert key.id != MasterKey(secret=SECRET[::-1]).id
    assert key.id not in (SECRET[:8], key.derived("wrapping")[:8])
    with pytest.raises(ValueError, match="32 bytes"):
        MasterKey(secret=b"short")
