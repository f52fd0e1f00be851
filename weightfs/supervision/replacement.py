"""Asking a running mount's supervisor to let another version take over, and handing the supervisor's process on.

What is asked is read by the *older* version, so it takes from it only what it must know, and hands the rest through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import subprocess
from collections.abc import Callable, Mapping
from typing import Any, Final

from weightfs import control
from weightfs.config import MountConfig
from weightfs.errors import UnfitError, UsageError, WeightfsError
from weightfs.supervision.daemon import Daemon, Version, for_children
from weightfs.supervision.estate import Estate
from weightfs.supervision.loop import Loop

log = logging.getLogger(__name__)

HANDOFF_VERSION: Final = 1
_HANDED_OFF: Final = (
    "kernel_fd", "ledger_fd", "source_fd", "held", "mounted_at", "is_kept", "listener_fd", "control_fd",
    "places", "device", "resends",
    "settings", "daemon", "log_file",
)  # fmt: skip
_REQUEST_S: Final = 5.0
_EXAMINE_S: Final = 20.0
_SAME: Final = ("source", "mountpoint", "state_folder", "for_others")
"""What a version that takes over must agree on with the mount that runs."""


def agreed(settings: MountConfig) -> dict[str, Any]:
    """What must be the same in both versions."""
    return {name: getattr(settings, name) for name in _SAME}


def ask_to_replace(settings: MountConfig, timeout_s: float) -> dict[str, Any]:
    """Ask a mount's supervisor to have this version take over; gives the mount document.

    Raises:
        WeightfsError: it refused, and why, and the running mount goes on; or nobody could be asked.
        BusyError: it did not answer in time.
    """
    version = Version.own(dataclasses.asdict(settings))
    request = {"command": "replace", "same": agreed(settings), **dataclasses.asdict(version)}
    return dict(control.ask(settings.supervisor_socket, request, timeout_s)["serving"])


def requested(said: bytes, settings: MountConfig) -> Version:
    """The version that is to take over a mount of these settings.

    Raises:
        UsageError: it is not understood.
        UnfitError: it is to be another mount.
    """
    try:
        request = json.loads(said)
        version = Version(
            interpreter=str(request["interpreter"]),
            environment=for_children(request["environment"]),
            settings=dict(request["settings"]),
        )
        wanted = request["same"]
        for name, value in agreed(settings).items():
            if wanted[name] != value:
                raise UnfitError(
                    f"the running mount has another {name.replace('_', ' ')}: {value}",
                    path=settings.mountpoint,
                    mend="umount it, then mount again",
                )
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UsageError(f"the running version does not understand the request: {e!r}") from None
    return version


class Door:
    """Where replacement is asked for: reads one request from each caller, and hands it on with the connection."""

    def __init__(self, loop: Loop, listener: socket.socket, asked: Callable[[socket.socket, bytes], None]) -> None:
        self._loop = loop
        self._listener = listener
        self._asked = asked
        loop.watch(listener.fileno(), self._accept)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        said, number = bytearray(), connection.fileno()

        def leave() -> None:
            self._loop.unwatch(number)
            self._loop.cancel(f"asked-{number}")

        def hear() -> None:
            part = connection.recv(1 << 16)
            said.extend(part)
            if not part or len(said) > control.LONGEST_REQUEST_BYTES:
                leave()
                connection.close()
            elif said.endswith(b"\n"):
                leave()
                self._asked(connection, bytes(said))

        def give_up() -> None:
            leave()
            connection.close()

        self._loop.watch(number, hear)
        self._loop.after(f"asked-{number}", _REQUEST_S, give_up)


def reply(connection: socket.socket, document: Mapping[str, Any]) -> None:
    """Answer, and hang up."""
    with connection, contextlib.suppress(OSError):
        connection.send(json.dumps(document).encode() + b"\n")


def refuse(connection: socket.socket, error: WeightfsError) -> None:
    """Answer with an error, and hang up."""
    reply(connection, {"error": control.error_document(error)})


def become(version: Version, estate: Estate, daemon: Daemon, log_file: str | None, *, resends: bool) -> None:
    """Go on in this process as the supervisor of the version that serves: returns only where that can't be."""
    document = {
        "version": HANDOFF_VERSION,
        **estate.handoff(),
        "settings": dict(version.settings),
        "daemon": daemon.handoff(),
        "log_file": log_file,
        "resends": resends,
    }
    own = {"NOTIFY_SOCKET": os.environ["NOTIFY_SOCKET"]} if "NOTIFY_SOCKET" in os.environ else {}
    environment = {**version.environment, **own}
    handoff = os.memfd_create("weightfs-handoff", 0)
    with open(handoff, "wb") as file:
        file.write(json.dumps(document).encode())
        file.flush()
        examined = subprocess.run(
            version.command("supervise", "--examine", str(handoff)),
            env=environment,
            pass_fds=[handoff],
            cwd="/",
            check=False,
            timeout=_EXAMINE_S,
        )
        if examined.returncode:
            log.error("the new version's supervisor can't go on from this one: it stays, the new daemon serves")
            return
        estate.set_inheritable(True)
        os.set_inheritable(daemon.link.fileno(), True)
        log.info("becomes %s", version.interpreter)
        try:
            os.execve(version.interpreter, version.command("supervise", "--resume", str(handoff)), environment)
        except OSError as e:
            log.error("could not become it: %s", e.strerror)
            estate.set_inheritable(False)
            os.set_inheritable(daemon.link.fileno(), False)


def read_handoff(fd: int) -> dict[str, Any]:
    """What `become` wrote, by whichever version; changes nothing.

    Raises:
        UnfitError: this version can't go on from it.
    """
    document: dict[str, Any] = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    missing = [key for key in _HANDED_OFF if key not in document]
    if document.get("version") != HANDOFF_VERSION or missing:
        raise UnfitError(f"the running supervisor's handoff has version {document.get('version')}, lacks {missing}")
    MountConfig(**document["settings"])
    return document
