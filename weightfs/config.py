"""Settings of a mount: defaults, a TOML file, the command line, in this order, parsed once."""

from __future__ import annotations

import dataclasses
import grp
import hashlib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from weightfs.errors import UsageError
from weightfs.sizes import parse_bytes, parse_layers

ENGINES: Final = ("auto", "passthrough", "portable")
STATE_BASE: Final = "/var/lib/weightfs"
"""Where root's mounts keep what they remember, a folder each."""
_LONGEST_S: Final = 86400.0
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "allow_other": (bool,),
    "deadline_s": (int, float),
    "attribute_timeout_s": (int, float),
    "draft": (dict,),
}
WATCH: Final = ("auto", "off")
PREFETCH: Final = ("layers", "whole", "off")
PREDICT: Final = ("auto", "off")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class MountConfig:
    """One mount.

    Attributes:
        source: absolute path of the folder to show.
        mountpoint: absolute path of the folder to show it at.
        engine: `auto` takes kernel passthrough where it works.
        allow_other: whether other users may use the mount; None is yes for root, no otherwise.
        state_dir: index, log; None is `default_state_dir`.
        metrics_listen: HOST:PORT to serve Prometheus metrics on, or None.
        control_group: whose members may use the control socket; None is nobody but the mount's owner.
        log_level: one of `LOG_LEVELS`.
        deadline_s: a request not answered by then fails with EIO.
        attribute_timeout_s: how long the kernel may believe a name or size of a folder that is not watched without
            asking; changes show up after it.
        watch: `auto` watches folders for changes where that works, so that the kernel may believe names for longer.
        prefetch: the order in which the weights of a model that is opened are read ahead, or `off`.
        predict: `auto` remembers which models are opened when, and reads while nobody else does what will likely be
            opened next, unless prefetch is off.
        memory_budget: what models may take of memory together, as `20GiB`; None is half of what is available.
        pin_layers: layers that are locked in memory once read, as `0-3`.
        draft: model -> the one that drafts for it, as paths below the source; it is read first.
    """

    source: str
    mountpoint: str
    engine: str = "auto"
    allow_other: bool | None = None
    state_dir: str | None = None
    metrics_listen: str | None = None
    control_group: str | None = None
    log_level: str = "info"
    deadline_s: float = 30.0
    attribute_timeout_s: float = 1.0
    watch: str = "auto"
    prefetch: str = "layers"
    predict: str = "auto"
    memory_budget: str | None = None
    pin_layers: str | None = None
    draft: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UsageError(f"engine {self.engine!r} is none of {', '.join(ENGINES)}")
        if self.watch not in WATCH:
            raise UsageError(f"watch {self.watch!r} is none of {', '.join(WATCH)}")
        if self.prefetch not in PREFETCH:
            raise UsageError(f"prefetch {self.prefetch!r} is none of {', '.join(PREFETCH)}")
        if self.predict not in PREDICT:
            raise UsageError(f"predict {self.predict!r} is none of {', '.join(PREDICT)}")
        if not all(isinstance(one, str) for one in self.draft.values()):
            raise UsageError("draft is a table of paths", mend='write [draft] and "big-model" = "small-model"')
        if self.log_level not in LOG_LEVELS:
            raise UsageError(f"log level {self.log_level!r} is none of {', '.join(LOG_LEVELS)}")
        if self.mountpoint != self.source and self.mountpoint.startswith(self.source.rstrip("/") + "/"):
            # Listing the source would ask the mount, which asks the source: neither would ever answer.
            raise UsageError("lies inside the source", path=self.mountpoint, mend="name a folder outside of it")
        for name in ("deadline_s", "attribute_timeout_s"):
            if not 0 <= getattr(self, name) <= _LONGEST_S:
                raise UsageError(f"{name} must lie between 0 and {_LONGEST_S:g} seconds")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        if self.pin_layers is not None:
            parse_layers(self.pin_layers)
        if self.metrics_listen is not None:
            listen_address(self.metrics_listen)
        if self.control_group is not None:
            group_id(self.control_group)

    @property
    def for_others(self) -> bool:
        """`allow_other`, decided."""
        return os.geteuid() == 0 if self.allow_other is None else self.allow_other

    @property
    def state_folder(self) -> str:
        """Where this mount keeps what it remembers."""
        return self.state_dir or default_state_dir(self.source)

    @property
    def memory_budget_bytes(self) -> int | None:
        """`memory_budget` in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    @property
    def pinned_layers(self) -> frozenset[str]:
        """The labels of `pin_layers`."""
        return frozenset() if self.pin_layers is None else parse_layers(self.pin_layers)

    @property
    def supervisor_socket(self) -> str:
        """Where the mount's supervisor listens."""
        return self._socket("supervisor")

    @property
    def control_socket(self) -> str:
        """Where the mount's daemon listens."""
        return self._socket("control")

    def _socket(self, kind: str) -> str:
        # One for each mountpoint, since mounts of one source share a state folder.
        digest = hashlib.blake2b(os.fsencode(self.mountpoint), digest_size=6).hexdigest()
        return os.path.join(self.state_folder, f"{kind}-{digest}.sock")


def default_state_dir(source: str) -> str:
    """The state folder of a source: readable in a listing, unique by digest."""
    base = STATE_BASE
    if os.geteuid() != 0:
        base = os.path.join(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "weightfs")
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", source).strip("-")[-40:] or "root"
    return os.path.join(base, f"{label}-{hashlib.blake2b(os.fsencode(source), digest_size=4).hexdigest()}")


def group_id(name: str) -> int:
    """The number of a group.

    Raises:
        UsageError: there is no such group.
    """
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise UsageError(f"there is no group {name!r}", mend="getent group shows those there are") from None


def listen_address(text: str) -> tuple[str, int]:
    """HOST:PORT taken apart, an IPv6 host in brackets.

    Raises:
        UsageError: it is no such thing.
    """
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]*)):(\d{1,5})", text)
    if found is None or int(found[3]) > 65535:
        raise UsageError(f"{text!r} is not HOST:PORT", mend="write 127.0.0.1:9464, or [::1]:9464")
    return found[1] or found[2] or "127.0.0.1", int(found[3])


def read_config(path: str) -> dict[str, Any]:
    """The settings in a TOML file; the names are `MountConfig`'s, with `-` or `_`.

    Raises:
        UsageError: it can't be read, or holds a key or a type that does not exist.
    """
    try:
        with open(path, "rb") as file:
            raw = tomllib.load(file)
    except OSError as e:
        raise UsageError(f"can't read it: {os.strerror(e.errno or 0)}", path=path) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError(f"is not TOML: {e}", path=path) from e
    known = {field.name for field in dataclasses.fields(MountConfig)} - {"source", "mountpoint"}
    settings = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UsageError(f"unknown key {key!r}", path=path, mend=f"keys are {', '.join(sorted(known))}")
        expected = _TYPES.get(name, (str,))
        if type(value) not in expected:
            raise UsageError(f"key {key!r} has the wrong type: {value!r}", path=path)
        settings[name] = value
    return settings


def mount_config(source: str, mountpoint: str, file: str | None, options: Mapping[str, Any]) -> MountConfig:
    """The settings of one mount: `options` that are not None win over `file`'s.

    Raises:
        UsageError: see `read_config` and `MountConfig`.
    """
    settings = read_config(file) if file else {}
    settings.update({name: value for name, value in options.items() if value is not None})
    # realpath of the folder above only: a dead mount makes the mountpoint itself unreadable.
    above, last = os.path.split(os.path.abspath(mountpoint))
    return MountConfig(
        source=os.path.realpath(source), mountpoint=os.path.join(os.path.realpath(above), last), **settings
    )
