"""The control socket, as the supervisor makes it and commands use it; `weightfs.control_server` answers on it.

A request is one line of JSON with a key `command`, the answer one line: the command's document, or `{"error": ...}`
with what the error was. A connection may carry several. Who may connect is the socket file's mode: 0600, or 0660 with
a group. No trio here: the supervisor and short commands do without.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from weightfs.config import group_id
from weightfs.errors import BusyError, IndexStoreError, IntegrityError, UnfitError, UsageError, WeightfsError

LONGEST_REQUEST_BYTES: Final = 64 << 10
_LONGEST_ANSWER_BYTES: Final = 64 << 20
_LONGEST_NAME_BYTES: Final = 64
"""A socket's address has 108 bytes, of which `/proc/self/fd/N/` takes some and a name of our own while it is made."""
_BACKLOG: Final = 128
_UCRED: Final = struct.Struct("3i")
_CLASSES: Final = {kind.code: kind for kind in (UsageError, UnfitError, BusyError, IntegrityError, IndexStoreError)}


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as the kernel says (SO_PEERCRED): when it connected, not now."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """Who connected."""
    return Peer(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def bind(path: str, group: str | None, *, even_if_taken: bool = False) -> socket.socket:
    """A listening socket at `path`, open to this user and, with a group, to its members; the caller owns it.

    Made under another name and renamed into place, so that it is never seen with another mode and a client finds the
    old one or the new one. What a daemon that died left there is replaced. With a group, a folder of our own that
    other users can't enter (the state folder) lets that group through. With `even_if_taken` who listens there is heard
    by nobody new: for whoever knows that his time is over.

    Raises:
        UsageError: there is no such group or it may not be given, or the path holds something else.
        BusyError: somebody listens there, and it is not to be taken from him.
        WeightfsError: the folder can't be written.
    """
    gid = None if group is None else group_id(group)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _folder_of(path) as (folder, name):
            if not even_if_taken:
                _refuse_if_taken(folder, name, path)
            if gid is not None:
                _let_through(folder, gid, path)
            fresh = f".{name}.{os.getpid()}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh, dir_fd=folder)
            listener.bind(_address(folder, fresh))
            try:
                place = _address(folder, fresh)
                os.chmod(place, 0o600)
                if gid is not None:
                    _give(place, gid, group)
                    os.chmod(place, 0o660)
                listener.listen(_BACKLOG)
                os.rename(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                os.unlink(fresh, dir_fd=folder)
                raise
    except OSError as e:
        listener.close()
        raise WeightfsError(f"can't listen there: {os.strerror(e.errno or 0)}", path=path) from e
    except BaseException:
        listener.close()
        raise
    return listener


def ask(path: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """Send one request and give the answer; all of it takes `timeout_s` at most.

    Raises:
        BusyError: no answer in time, or the daemon ended before it answered (its successor can be asked).
        WeightfsError: nobody listens there, or not for this user; or the error that the daemon answered with.
    """
    ends = time.monotonic() + timeout_s
    line = json.dumps(request).encode() + b"\n"
    if len(line) > LONGEST_REQUEST_BYTES:
        raise UsageError(f"a request of {len(line)} bytes is too long, {LONGEST_REQUEST_BYTES} at most")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(timeout_s)
            with _folder_of(path) as (folder, name):
                connection.connect(_address(folder, name))
            connection.sendall(line)
            said = _receive_line(connection, ends)
        except (TimeoutError, BlockingIOError):  # the latter: its queue of connections is full
            raise BusyError(f"did not answer within {timeout_s:g} s", path=path) from None
        except PermissionError:
            raise WeightfsError(
                "is not for this user", path=path, mend="mount with --control-group, or ask as its owner"
            ) from None
        except (BrokenPipeError, ConnectionResetError):
            said = b""
        except OSError as e:
            raise WeightfsError(
                f"nobody listens there: {os.strerror(e.errno or 0)}",
                path=path,
                mend="weightfs status tells what is mounted; weightfs mount takes a dead mount away",
            ) from e
    if not said.endswith(b"\n"):
        raise BusyError("the daemon ended before it answered", path=path)
    answer: dict[str, Any] = json.loads(said)
    if "error" in answer:
        raise error_from(answer["error"])
    return answer


def error_document(error: WeightfsError) -> dict[str, Any]:
    """An error as an answer carries it."""
    return {
        "code": error.code,
        "message": error.message,
        "path": error.path,
        "mend": error.mend,
        "exit_code": error.exit_code,
    }


def error_from(document: Mapping[str, Any]) -> WeightfsError:
    """The error that `error_document` was made from, as far as a caller can tell it apart: class and exit code."""
    kind = _CLASSES.get(document["code"], WeightfsError)
    return kind(document["message"], path=document.get("path"), mend=document.get("mend"))


def _receive_line(connection: socket.socket, ends: float) -> bytes:
    said = bytearray()
    while not said.endswith(b"\n"):
        left = ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        part = connection.recv(1 << 16)
        if not part or len(said) + len(part) > _LONGEST_ANSWER_BYTES:
            break
        said += part
    return bytes(said)


@contextlib.contextmanager
def _folder_of(path: str) -> Iterator[tuple[int, str]]:
    """The folder as a descriptor, and the name in it: an address of 108 bytes is too short for many paths."""
    above, name = os.path.split(os.path.abspath(path))
    if len(os.fsencode(name)) > _LONGEST_NAME_BYTES:
        raise UsageError(f"a socket's name may have {_LONGEST_NAME_BYTES} bytes", path=path)
    folder = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield folder, name
    finally:
        os.close(folder)


def _address(folder: int, name: str) -> str:
    return f"/proc/self/fd/{folder}/{name}"


def _refuse_if_taken(folder: int, name: str, path: str) -> None:
    try:
        entry = os.lstat(name, dir_fd=folder)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(entry.st_mode):
        raise UsageError("holds something that is no socket", path=path, mend="move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)
        try:
            probe.connect(_address(folder, name))
        except BlockingIOError:
            pass
        except OSError as e:
            if e.errno in (errno.ECONNREFUSED, errno.ENOENT):
                return
            raise
    raise BusyError("somebody listens there already", path=path, mend="weightfs status")


def _let_through(folder: int, gid: int, path: str) -> None:
    entry = os.fstat(folder)
    if entry.st_mode & stat.S_IXOTH or (entry.st_gid == gid and entry.st_mode & stat.S_IXGRP):
        return
    place = f"/proc/self/fd/{folder}"
    if entry.st_uid != os.geteuid():
        raise UsageError("the group can't enter that folder, which is another user's", path=os.path.dirname(path))
    _give(place, gid, None)
    os.chmod(place, stat.S_IMODE(entry.st_mode) & ~stat.S_IRWXG | stat.S_IXGRP)


def _give(place: str, gid: int, group: str | None) -> None:
    try:
        os.chown(place, -1, gid)
    except PermissionError:
        raise UsageError(
            f"only root or a member may give it to group {group or gid}", mend="name a group you are in"
        ) from None
