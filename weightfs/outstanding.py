"""Requests that were read and not answered yet: each ends once, by its deadline, and has room for its reply.

Replies wait in the buffer of the pair towards pyfuse3, and libfuse drops a reply that finds it full. So what may be
under way is bounded: each request reserves what its reply can take, and whoever reads the kernel waits for that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import trio

from weightfs import wire
from weightfs.ledger import Ledger
from weightfs.wire import Opcode

_OF_NAMES: Final = frozenset({Opcode.LOOKUP, Opcode.READDIR, Opcode.READDIRPLUS})


@dataclass(slots=True)
class Request:
    """One of them.

    Attributes:
        opcode, nodeid: as the kernel sent them.
        reserved_bytes: of the room for replies.
        expires: its deadline, in trio's time.
        since: when it was read, in monotonic seconds.
    """

    opcode: int
    nodeid: int
    reserved_bytes: int
    expires: float
    since: float = field(default_factory=time.monotonic)


class Outstanding:
    """Requests by `unique`. `settle` and `held_s` may be called from any thread, all else from trio's.

    Args:
        room_bytes: what replies may take all together; a single one may take more.
        deadline_s: from `add` to a request's deadline.
        ledger: is told of requests that came again and are answered now.
    """

    def __init__(self, room_bytes: int, deadline_s: float, ledger: Ledger) -> None:
        self._pending: dict[int, Request] = {}
        self._room_bytes = room_bytes
        self._room = trio.Event()
        self._deadline_s = deadline_s
        self._ledger = ledger

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, unique: int) -> bool:
        return unique in self._pending

    async def reserve(self, wanted_bytes: int) -> None:
        """Wait for room, and take it; no checkpoint where there is room."""
        while self._pending and self._room_bytes < wanted_bytes:
            self._room = trio.Event()
            await self._room.wait()
        self._room_bytes -= wanted_bytes

    def add(self, unique: int, opcode: int, nodeid: int, reserved_bytes: int) -> None:
        """It was read; `reserved_bytes` have been reserved for its reply."""
        self._pending[unique] = Request(opcode, nodeid, reserved_bytes, trio.current_time() + self._deadline_s)

    def settle(self, unique: int) -> Request | None:
        """End a request, once: None for whoever comes second."""
        request = self._pending.pop(unique, None)
        if request is not None and unique & wire.UNIQUE_RESEND:
            self._ledger.resent_answered(unique & ~wire.UNIQUE_RESEND)
        return request

    def give_back(self, request: Request) -> None:
        """Its reply needs its room no more."""
        self._room_bytes += request.reserved_bytes
        self._room.set()

    def settle_all(self, before: float | None = None) -> Iterator[tuple[int, Request]]:
        """End those whose deadline is before a time, or all, and give their room back; each as it is asked for."""
        for unique, request in list(self._pending.items()):
            if (before is None or request.expires < before) and self.settle(unique):
                self.give_back(request)
                yield unique, request

    def held_s(self, nodeid: int) -> float:
        """For how long the oldest LOOKUP or listing of a folder has waited, with the kernel's lock of that folder."""
        asked = (one.since for one in list(self._pending.values()) if one.nodeid == nodeid and one.opcode in _OF_NAMES)
        return time.monotonic() - min(asked, default=time.monotonic())
