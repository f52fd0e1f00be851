"""Answers on the control socket; see `weightfs.control` for what is said on it.

Clients are other programs: each has so long to send its request and to take the answer, and there may be so many.
Whatever one of them does ends its connection, never the daemon.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from weightfs.control import LONGEST_REQUEST_BYTES, Peer, error_document, peer_of
from weightfs.errors import BusyError, UsageError, WeightfsError

log = logging.getLogger(__name__)

Command = Callable[[Mapping[str, Any], Peer], Awaitable[Mapping[str, Any]]]
"""Answers a request, given whole. May raise WeightfsError, which becomes the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """Limits of the server.

    Attributes:
        request_s: a client that has not sent its whole request by then is dropped, and so is one that waits between
            two. It also bounds how long others wait when `connections` idle ones are there.
        answer_s: a command that has not answered by then is given up. What takes longer should start it and return.
        delivery_s: a client that has not taken the answer by then is dropped.
        connections: how many there may be at once; others wait in the socket's queue.
    """

    request_s: float = 5.0
    answer_s: float = 30.0
    delivery_s: float = 5.0
    connections: int = 128


async def serve(listener: socket.socket, commands: Mapping[str, Command], config: ControlConfig | None = None) -> None:
    """Answer until cancelled. The listener stays the caller's: a successor goes on with it."""
    limits = config or ControlConfig()
    room = trio.CapacityLimiter(limits.connections)
    listener.setblocking(False)
    async with trio.open_nursery() as nursery:
        while True:
            # An object to hold the room for: many connections, one task that accepts.
            holder = object()
            await room.acquire_on_behalf_of(holder)
            connection = await _accept(listener)
            nursery.start_soon(_converse, connection, commands, limits, room, holder)


async def _accept(listener: socket.socket) -> socket.socket:
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another process on the same socket had it, or it is gone
            continue
        except OSError as e:  # out of descriptors, for one: it passes, and the socket stays readable meanwhile
            log.warning("can't take a control connection: %s", e.strerror)
            await trio.sleep(1)
            continue
        return connection


async def _converse(
    connection: socket.socket,
    commands: Mapping[str, Command],
    limits: ControlConfig,
    room: trio.CapacityLimiter,
    holder: object,
) -> None:
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
    try:
        peer = peer_of(connection)
        rest = b""
        while True:
            with trio.fail_after(limits.request_s):
                line, rest = await _next_line(stream, rest)
            if line is None:
                return
            answer = await _answer(line, peer, commands, limits)
            with trio.fail_after(limits.delivery_s):
                await stream.send_all(json.dumps(answer).encode() + b"\n")
            if len(line) > LONGEST_REQUEST_BYTES:
                return
    except (OSError, trio.BrokenResourceError, trio.TooSlowError) as e:
        log.debug("control connection ended: %r", e)
    finally:
        room.release_on_behalf_of(holder)
        await trio.aclose_forcefully(stream)


async def _next_line(stream: trio.SocketStream, rest: bytes) -> tuple[bytes | None, bytes]:
    """One line and what came behind it; None at the end of the stream, a last line without its end included.

    Of a line that is too long as much as was read: enough to see that it is.
    """
    said = bytearray(rest)
    while b"\n" not in said and len(said) <= LONGEST_REQUEST_BYTES:
        part = await stream.receive_some(1 << 14)
        if not part:
            return None, b""
        said += part
    line, _, behind = bytes(said).partition(b"\n")
    return line, behind


async def _answer(line: bytes, peer: Peer, commands: Mapping[str, Command], limits: ControlConfig) -> Mapping[str, Any]:
    try:
        request = _parse(line)
        name = request.get("command")
        command = commands.get(name) if isinstance(name, str) else None
        if command is None:
            raise UsageError(f"no such command: {name!r}", mend=f"there are {', '.join(sorted(commands))}")
        try:
            with trio.fail_after(limits.answer_s):
                return await command(request, peer)
        except trio.TooSlowError:
            raise BusyError(f"{name} did not answer within {limits.answer_s:g} s") from None
    except WeightfsError as e:
        return {"error": error_document(e)}
    except Exception as e:
        log.exception("control request of uid %d failed", peer.uid)
        return {"error": error_document(WeightfsError(f"failed: {e!r}", mend="see the daemon's log"))}


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > LONGEST_REQUEST_BYTES:
        raise UsageError(f"a request may have {LONGEST_REQUEST_BYTES} bytes")
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError("a request is one line of JSON") from None
    if not isinstance(request, dict):
        raise UsageError("a request is a JSON object")
    return request
