"""How commands speak: one JSON document or text on stdout, everything else on stderr, one line for an error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from weightfs.errors import BusyError, IntegrityError, WeightfsError

SCHEMA = 1


def emit(document: Mapping[str, Any]) -> None:
    """Write the one JSON document of a command."""
    sys.stdout.write(json.dumps({"schema": SCHEMA, **document}, indent=2, ensure_ascii=True) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Write a line for people, in a form that no name in a header can break."""
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")


def announce(document: Mapping[str, Any], *, as_json: bool) -> None:
    """Say that a mount serves."""
    if as_json:
        emit(document)
        return
    say(
        f"{printable(document['source'])} on {printable(document['mountpoint'])}: {document['engine']} engine "
        f"({document['reason']}), supervisor {document['supervisor_pid']}, daemon {document['daemon_pid']}"
    )
    sys.stdout.flush()


def fail(error: WeightfsError, *, as_json: bool) -> NoReturn:
    """One line (or document) of what, which path, why and what to do; then the exit code."""
    if as_json:
        emit({"error": {"code": error.code, "message": error.message, "path": error.path, "mend": error.mend}})
    line = f"weightfs: {error}" + (f"; {error.mend}" if error.mend else "")
    sys.stderr.write(printable(line) + "\n")
    sys.exit(error.exit_code)


def fail_for(failed: Sequence[WeightfsError], *, as_json: bool = False) -> None:
    """Say every reason on stderr; the gravest decides the exit code, and is the document where none is written yet."""
    if not failed:
        return
    *others, worst = sorted(failed, key=lambda one: (isinstance(one, IntegrityError), not isinstance(one, BusyError)))
    for error in others:
        sys.stderr.write(printable(f"weightfs: {error}") + "\n")
    fail(worst, as_json=as_json)


@contextmanager
def reporting(*, as_json: bool) -> Iterator[None]:
    """Turn the errors weightfs raises on purpose into `fail`; with debug logging the traceback comes along."""
    try:
        yield
    except WeightfsError as e:
        logging.getLogger("weightfs").debug("failed", exc_info=e)
        fail(e, as_json=as_json)


def printable(text: str) -> str:
    """Text on one line that can't steer a terminal: names of files and tensors are a stranger's bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def human_bytes(count: int) -> str:
    """`1.4 GiB`, `23 KiB`, `17 B`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


Command = Callable[..., None]
