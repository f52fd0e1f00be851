"""Requests that came again after a daemon died: one of them may be what it died of.

They are tried one at a time, and the ledger says which: should the next daemon die as well, it was that one, and the
others, which only waited in the same line, have nothing to do with it. Which is why deaths alone do not convict: under
load a request may well be in the hands of two daemons that die one after the other.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from weightfs.ledger import Ledger
from weightfs.outstanding import Outstanding
from weightfs.wire import UNIQUE_RESEND

log = logging.getLogger(__name__)

_TRIAL_S: Final = 0.1
"""For which the others wait. One that takes longer (a slow source) goes on beside them."""
_LOOK_S: Final = 0.002
_MOST_DEATHS: Final = 4
"""After so many deaths a request is answered EIO though none was in its trial: it may kill slowly."""


class Suspects:
    """The line of them.

    Args:
        ledger: says in whose trial the last daemon died, and hears whose goes on.
        outstanding: holds a request until it is answered.

    Attributes:
        poisoned: how many were found guilty.
    """

    def __init__(self, ledger: Ledger, outstanding: Outstanding) -> None:
        self._ledger = ledger
        self._outstanding = outstanding
        self._line: deque[tuple[int, bytearray]] = deque()
        self._more = trio.Event()
        self.poisoned = 0

    def is_guilty(self, opcode: int, unique: int, nodeid: int) -> bool:
        """Whether a request that has come again must not be tried once more."""
        number = unique & ~UNIQUE_RESEND
        deaths = self._ledger.deaths_seen(number)
        if number != self._ledger.culprit and deaths < _MOST_DEATHS:
            return False
        self.poisoned += 1
        log.error("request %d of inode %#x has seen %d daemons die: answered EIO", opcode, nodeid, deaths)
        return True

    def add(self, unique: int, message: memoryview) -> None:
        """It waits for its trial."""
        self._line.append((unique, bytearray(message)))
        self._more.set()

    def empty(self) -> list[int]:
        """Give up the trials: gives those who waited."""
        waiting = [unique for unique, _ in self._line]
        self._line.clear()
        return waiting

    async def try_them(self, take: Callable[[bytearray, int], Awaitable[None]]) -> None:
        """Try one after the other, for ever; `take` deals with a message of so many bytes as if it came anew."""
        while True:
            while self._line:
                unique, message = self._line.popleft()
                self._ledger.on_trial(unique & ~UNIQUE_RESEND)
                await take(message, len(message))
                with trio.move_on_after(_TRIAL_S):
                    while unique in self._outstanding:  # noqa: ASYNC110 - threads settle too, and can't set an event
                        await trio.sleep(_LOOK_S)
            self._ledger.on_trial(0)
            self._more = trio.Event()
            await self._more.wait()
