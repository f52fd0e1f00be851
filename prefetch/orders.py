"""Learned orders on disk: a small document for each model's folder, in the state folder of its source."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from prefetch.learning import MAX_EXTENTS
from prefetch.plan import Extent
from weightfs.errors import WeightfsError

log = logging.getLogger(__name__)

_SCHEMA: Final = 1
_MAX_ORDERS: Final = 16
_MAX_BYTES: Final = 32 << 20


class _Order(msgspec.Struct, frozen=True, kw_only=True):
    family: str  # of loaders
    recorded: float  # seconds since 1970
    extents: list[tuple[str, int, int]]

    def files(self) -> set[str]:
        return {file for file, _, _ in self.extents}


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    schema: int
    folder: str
    orders: list[_Order]  # the newest first


def read_order(
    state_folder: str, folder: str, files: Collection[str] | None = None, family: str | None = None
) -> list[Extent] | None:
    """The order that was learned last for a model; None where there is none, or none that can be read.

    Reads one small file; blocks.

    Args:
        state_folder: of the source that the model lies in.
        folder: of the model, from the root of the source.
        files: of the model, where the folder holds several; an order that touches none of them is passed over.
        family: of loaders; None is any.
    """
    document = _load(_path(state_folder, folder))
    if document is None or document.folder != folder:
        return None
    for order in document.orders:
        if family in (None, order.family) and (files is None or not order.files().isdisjoint(files)):
            return [Extent(*one) for one in order.extents[:MAX_EXTENTS]]
    return None


def write_order(state_folder: str, folder: str, family: str, extents: Sequence[Extent]) -> str:
    """Keep an order; takes the place of the same family's of the same files. Gives the path of the document.

    Args:
        state_folder, folder: see `read_order`; the state folder is made if it is missing.
        family: the loader's name, as `transformers`.
        extents: as `learn` gives them, at least one.

    Raises:
        WeightfsError: it can't be written.
    """
    path = _path(state_folder, folder)
    known = _load(path)
    fresh = _Order(
        family=family,
        recorded=time.time(),
        extents=[(one.file, one.offset, one.nbytes) for one in extents[:MAX_EXTENTS]],
    )
    others = known.orders if known is not None and known.folder == folder else []
    kept = [one for one in others if (one.family, one.files()) != (family, fresh.files())]
    document = _Document(schema=_SCHEMA, folder=folder, orders=[fresh, *kept][:_MAX_ORDERS])
    temporary = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(msgspec.json.encode(document))
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except (OSError, UnicodeEncodeError) as e:
        why = os.strerror(e.errno or 0) if isinstance(e, OSError) else "a file's name is not UTF-8"
        raise WeightfsError(f"the order can't be kept: {why}", path=path) from e
    return path


def _path(state_folder: str, folder: str) -> str:
    digest = hashlib.blake2b(os.fsencode(folder), digest_size=16).hexdigest()
    return os.path.join(state_folder, "orders", f"{digest}.json")


def _load(path: str) -> _Document | None:
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES + 1)
        document = msgspec.json.decode(text, type=_Document)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as e:
        log.warning("the learned order %s can't be used: %s", path, e)
        return None
    return document if document.schema == _SCHEMA else None
