"""The history of model opens in the index: the last ones as they were, older ones as what a predictor made of them.

Room `history`: b"open" and a number of eight bytes -> model and second; b"state" -> a predictor's state. Each record is
sealed, and one that is damaged is dropped alone: a history is worth less than the numbers beside it. Opens pass the
store's overlay by, and with it the journal: a version that does not know the room must be able to replay that. They
are committed when `note` returns, so a daemon that is killed loses none; power lost may cost the last ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import msgspec

from weightfs.index.database import Database
from weightfs.index.opening import Transaction
from weightfs.index.seals import CorruptIndexError, seal, unseal

log = logging.getLogger(__name__)

_ROOM: Final = b"history"
_OPEN: Final = b"open"
_AFTER_OPENS: Final = b"oq"
_STATE: Final = b"state"  # behind them
MOST_OPENS: Final = 4096
MOST_STATE_BYTES: Final = 4 << 20
MOST_NAME_BYTES: Final = 4096
Open = tuple[str, int]
"""Model, and the second since 1970 in which it was opened."""


class History:
    """The opens of one source's models. Thread-safe, as the database is; every call may wait for the disk.

    Several daemons may share an index: each open gets its number in the transaction that writes it.
    """

    def __init__(self, database: Database) -> None:
        """`database`: of an `IndexStore`, which closes it."""
        self._database = database

    def note(self, model: str, at_s: float) -> int:
        """Add an open, and drop the oldest beyond `MOST_OPENS`; one whose name is no path's length is left out.

        Args:
            model: at most `MOST_NAME_BYTES`.
            at_s: seconds since 1970, 0 or more; stored in whole ones.

        Returns:
            How many there are: time to `compact` before there are `MOST_OPENS`.

        Raises:
            IndexStoreError: it could not be written.
        """
        name = model.encode(errors="surrogateescape")
        value = msgspec.msgpack.encode((name, max(0, int(at_s))))
        held = 0

        def write(txn: Transaction) -> None:
            nonlocal held
            held = txn.stat(self._room)["entries"] - (txn.get(_STATE, db=self._room) is not None)
            with txn.cursor(db=self._room) as cursor:
                if len(name) <= MOST_NAME_BYTES:
                    last = cursor.prev() if cursor.set_range(_AFTER_OPENS) else cursor.last()
                    key = _OPEN + (_number(bytes(cursor.key())) + 1 if last else 1).to_bytes(8, "big")
                    cursor.put(key, seal(_ROOM, key, value))
                    held += 1
                while held > MOST_OPENS and cursor.first():
                    cursor.delete()
                    held -= 1

        self._database.write(write)
        return held

    def opens(self) -> list[Open]:
        """Those not compacted yet, oldest first."""
        found = self._database.read(lambda txn: [self._open_of(txn, key) for key in self._open_keys(txn)])
        return [one for one in found or [] if one is not None]

    def state(self) -> bytes:
        """What `compact` made of the opens before these; b"" when there is nothing."""
        return self._database.read(self._state_of) or b""

    def since(self, position: int) -> tuple[bytes | None, list[Open], int]:
        """What came after a position, in one transaction.

        Args:
            position: what the last call gave; 0 at first.

        Returns:
            A state, b"" when there is none, if everything is to be learned anew from it and all opens: at first, and
            where opens behind the position were folded, or the index began anew. None if the opens are to be added to
            what is known. The opens, oldest first. The new position.
        """

        def read(txn: Transaction) -> tuple[bytes | None, list[Open], int]:
            keys = self._open_keys(txn)
            oldest, newest = (_number(keys[0]), _number(keys[-1])) if keys else (0, 0)
            goes_on = 0 < position <= newest and oldest <= position + 1
            if goes_on:
                keys = [key for key in keys if _number(key) > position]
            opens = [one for key in keys if (one := self._open_of(txn, key)) is not None]
            return None if goes_on else self._state_of(txn) or b"", opens, newest

        return self._database.read(read) or (None, [], position)

    def compact(self, fold: Callable[[bytes, list[Open]], bytes], *, keep: int = MOST_OPENS // 2) -> int:
        """Fold all but the last `keep` opens into the state; gives how many were folded.

        Args:
            fold: from a state (b"" at first) and opens, oldest first, to the state after them. It runs without the
                index's lock, and gives at most `MOST_STATE_BYTES`; what is larger is not stored.
            keep: 0 or more.

        Raises:
            IndexStoreError: it could not be written; nothing was folded.
        """
        found = self._database.read(lambda txn: self._old(txn, keep))
        if found is None or not found[1]:
            return 0
        before, old, opens = found
        state = fold(before, opens)
        folded = 0

        def write(txn: Transaction) -> None:
            nonlocal folded
            folded = 0
            if self._old(txn, keep, len(old))[:2] != (before, old):
                return  # another daemon was faster
            if len(state) > MOST_STATE_BYTES:
                log.warning("history: a state of %d bytes is not stored", len(state))
            else:
                txn.put(_STATE, seal(_ROOM, _STATE, state), db=self._room)
            for key in old:
                txn.delete(key, db=self._room)
            folded = len(old)

        self._database.write(write)
        return folded

    def _old(self, txn: Transaction, keep: int, most: int | None = None) -> tuple[bytes, list[bytes], list[Open]]:
        """The state, and the keys and values of all opens but the last `keep`, of these the first `most`."""
        keys = self._open_keys(txn)
        old = keys[: max(0, len(keys) - keep)][:most]
        return self._state_of(txn) or b"", old, [one for key in old if (one := self._open_of(txn, key)) is not None]

    @property
    def _room(self) -> Any:
        return self._database.rooms[_ROOM]  # another one when the index began anew

    def _open_keys(self, txn: Transaction) -> list[bytes]:
        with txn.cursor(db=self._room) as cursor:
            keys = [bytes(key) for key in cursor.iternext(keys=True, values=False)] if cursor.first() else []
        return [key for key in keys if key < _AFTER_OPENS]

    def _open_of(self, txn: Transaction, key: bytes) -> Open | None:
        if (value := self._value(txn, key)) is None:
            return None
        try:
            name, at_s = msgspec.msgpack.decode(value, type=tuple[bytes, int])
        except msgspec.MsgspecError as e:
            log.warning("history: an open is dropped: %s", e)
            return None
        return name.decode(errors="surrogateescape"), at_s

    def _state_of(self, txn: Transaction) -> bytes | None:
        return self._value(txn, _STATE)

    def _value(self, txn: Transaction, key: bytes) -> bytes | None:
        if (sealed := txn.get(key, db=self._room)) is None:
            return None
        try:
            return unseal(_ROOM, key, bytes(sealed))
        except CorruptIndexError as e:
            log.warning("history: a record is dropped: %s", e)
            return None


def _number(key: bytes) -> int:
    return int.from_bytes(key[len(_OPEN) :], "big")
