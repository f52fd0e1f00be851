"""The life of a process whose weights step aside, through two snapshots; what holds of it on any device."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.helpers.mounting import wait_until
from tests.helpers.served import Commands


class Life:
    """A `released_child`, snapshotted at its point and from outside, restored after both.

    Args:
        commands: with a store of their own.
        folder: for what the child tells.
        device: see `released_child`.
        weights: path of the file.
    """

    def __init__(self, commands: Commands, folder: Path, device: str, weights: str) -> None:
        self.commands = commands
        self.told = str(folder / "told")
        module = [sys.executable, "-m", "tests.helpers.released_child"]
        self.command = [*module, self.told, device, weights]
        self.bytes: list[dict[str, int]] = []

    def first(self) -> dict[str, Any]:
        """What it tells after the restore of the snapshot that was made at its point."""
        self.bytes.append(self.commands.told("create", "first", command=self.command)["bytes"])
        return self.restored("first")

    def second(self) -> dict[str, Any]:
        """The same after one more snapshot, of the restored process."""
        assert "away" in self._ask()
        self.bytes.append(self.commands.told("create", "second", "--pid", str(self.pid))["bytes"])
        return self.restored("second")

    def again(self) -> dict[str, Any]:
        """The same of one more block, without a snapshot."""
        self._ask()
        return self._ask()

    def restored(self, name: str) -> dict[str, Any]:
        """What it tells after a restore of one of both."""
        self._forget()
        self.pid = int(self.commands.told("restore", name)["pid"])
        return self._ask() if name == "second" else self._said()

    def _ask(self) -> dict[str, Any]:
        """Have it go on, and give what it tells next."""
        self._forget()
        os.kill(self.pid, signal.SIGUSR1)
        return self._said()

    def _forget(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.told)

    def _said(self) -> dict[str, Any]:
        wait_until(lambda: os.path.exists(self.told), "the child tells something", timeout_s=60)
        with open(self.told, encoding="utf-8") as file:
            document: dict[str, Any] = json.load(file)
        return document
