"""The master key of a store, and where it comes from: a file, an environment variable or a command that prints it.

A file holds 32 raw bytes. What a variable or a command gives may be those, or 64 hexadecimal digits, or Base64 of them:
a variable holds no zero byte, and KMS and Vault print text. No error and no log shows any of it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import shlex
import signal
import stat
import subprocess
from dataclasses import dataclass, field
from typing import Final

import blake3

from checkpoint import guarded
from checkpoint.errors import MasterKeyError

KEY_BYTES: Final = 32
_MOST_TEXT: Final = 4096
_COMMAND_S: Final = 60.0
_NEW_KEY: Final = "make one with: (umask 077; head -c 32 /dev/urandom > FILE)"


@dataclass(frozen=True, kw_only=True, slots=True)
class MasterKey:
    """What a store's keys are wrapped with.

    Attributes:
        secret: 32 bytes; not shown.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(self.secret)}")

    @property
    def id(self) -> bytes:
        """8 bytes by which a key is recognised, which say nothing of the key."""
        return self.derived("key id")[:8]

    def derived(self, purpose: str) -> bytes:
        """A key of 32 bytes for one purpose, from which neither this one nor that of another purpose follows."""
        return derived(self.secret, purpose)


def derived(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose (BLAKE3's key derivation mode)."""
    return blake3.blake3(secret, derive_key_context=f"weightfs 2026 checkpoint.chunks: {purpose}").digest()


def from_file(path: str) -> MasterKey:
    """The key in a file of 32 raw bytes that nobody but its owner may read; symlinks are followed.

    Raises:
        MasterKeyError: it can't be read, has another size, or others may read or replace it.
        CorruptError: others could have put it, or a folder above it, in its place.
    """
    real = os.path.realpath(path)
    try:
        fd = os.open(real, guarded.FILE)
    except OSError as e:
        mend = _NEW_KEY.replace("FILE", shlex.quote(path)) if isinstance(e, FileNotFoundError) else None
        raise MasterKeyError(f"the key can't be read: {os.strerror(e.errno or 0)}", path=path, mend=mend) from e
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise MasterKeyError("is no regular file", path=path)
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise MasterKeyError(
                f"others may read the key (mode {stat.S_IMODE(found.st_mode):04o})",
                path=path,
                mend=f"chmod 0600 {shlex.quote(path)}, and use a new key if somebody may have read it",
            )
        guarded.require_ours(found, path)
        guarded.require_path_ours(os.path.dirname(real))
        content = os.read(fd, KEY_BYTES + 1)
    finally:
        os.close(fd)
    if len(content) != KEY_BYTES:
        size = "more" if len(content) > KEY_BYTES else str(len(content))
        raise MasterKeyError(
            f"a key has {KEY_BYTES} raw bytes, this file {size}",
            path=path,
            mend=_NEW_KEY.replace("FILE", shlex.quote(path)),
        )
    return MasterKey(secret=content)


def from_environment(name: str) -> MasterKey:
    """The key in an environment variable, which is taken out of it: what is started from here on does not inherit it.

    Raises:
        MasterKeyError: there is none, or it holds no key.
    """
    value = os.environb.pop(os.fsencode(name), None)
    if value is None:
        raise MasterKeyError(f"the environment variable {name} with the key is not set")
    return _parsed(value, f"the environment variable {name}")


def from_command(command: str) -> MasterKey:
    """The key that a command prints; it is split as a shell would, and no shell runs it.

    Raises:
        MasterKeyError: it can't be started, fails, takes longer than a minute or prints no key.
    """
    try:
        arguments = shlex.split(command)
    except ValueError as e:
        raise MasterKeyError(f"the key command can't be split: {e}") from e
    if not arguments:
        raise MasterKeyError("the key command is empty")
    try:
        # Its own session, so that what it started ends with it: that would keep the pipe open.
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as e:
        raise MasterKeyError(f"the key command can't be started: {e.strerror}", path=arguments[0]) from e
    with process:
        try:
            printed, said = process.communicate(timeout=_COMMAND_S)
        except subprocess.TimeoutExpired as e:
            raise MasterKeyError(f"the key command printed no key within {_COMMAND_S:.0f} s", path=arguments[0]) from e
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        last = said.decode(errors="replace").strip().rpartition("\n")[2][:200]
        raise MasterKeyError(
            f"the key command ended with {process.returncode}" + (f": {last}" if last else ""), path=arguments[0]
        )
    return _parsed(printed, "the key command's output")


def _parsed(value: bytes, what: str) -> MasterKey:
    """A key as raw bytes or text."""
    if len(value) == KEY_BYTES:
        return MasterKey(secret=value)
    text = value.strip() if len(value) <= _MOST_TEXT else b""
    for decode in (binascii.unhexlify, lambda given: base64.b64decode(given, validate=True)):
        with contextlib.suppress(binascii.Error, ValueError):
            if len(secret := decode(text)) == KEY_BYTES:
                return MasterKey(secret=secret)
    raise MasterKeyError(f"{what} is no key: neither 32 raw bytes nor 64 hexadecimal digits nor Base64 of 32 bytes")
