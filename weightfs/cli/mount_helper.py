"""`mount.weightfs`, which mount(8) calls: `mount -t weightfs SOURCE MOUNTPOINT -o OPTIONS`, and /etc/fstab."""

from __future__ import annotations

import sys
from typing import Any, Final

from weightfs.cli.mounting import start
from weightfs.cli.output import reporting
from weightfs.config import mount_config
from weightfs.errors import UsageError

_TEXT: Final = frozenset(
    {
        "engine",
        "state_dir",
        "metrics_listen",
        "control_group",
        "log_level",
        "watch",
        "prefetch",
        "predict",
        "pin_layers",
        "memory_budget",
    }
)
_NUMBER: Final = frozenset({"deadline_s", "attribute_timeout_s"})
# What mount(8) passes on or fstab says for itself. `rw` is its default, and no request to write.
_IGNORED: Final = frozenset({
    "rw", "ro", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "auto", "noauto", "user", "nouser", "users",
    "nofail", "defaults", "_netdev", "relatime", "noatime",
})  # fmt: skip
_FAILED: Final = 32
"""mount(8)'s own exit status for a mount that failed."""


def parse(arguments: list[str]) -> tuple[str, str, str | None, dict[str, Any]]:
    """SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS] taken apart: source, mountpoint, configuration file, settings.

    Raises:
        UsageError: an option that does not exist.
    """
    places: list[str] = []
    options: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "-o":
            options += next(rest, "").split(",")
        elif argument in ("-s", "-n", "-v", "-f"):
            continue
        elif argument == "-t":
            next(rest, None)
        elif argument.startswith("-"):
            raise UsageError(f"unknown option {argument!r}")
        else:
            places.append(argument)
    if len(places) != 2:
        raise UsageError("mount.weightfs takes a source and a mountpoint", mend="mount -t weightfs SOURCE MOUNTPOINT")
    file = None
    settings: dict[str, Any] = {}
    for option in filter(None, options):
        key, _, value = option.partition("=")
        name = key.replace("-", "_")
        if name in ("allow_other", "no_allow_other"):
            settings["allow_other"] = name == "allow_other"
        elif name == "config":
            file = value
        elif name in _TEXT:
            settings[name] = value
        elif name in _NUMBER:
            try:
                settings[name] = float(value)
            except ValueError:
                raise UsageError(f"{value!r} is no number for {name}") from None
        elif key not in _IGNORED and not key.startswith(("x-", "comment")):
            raise UsageError(f"unknown mount option {option!r}")
    return places[0], places[1], file, settings


def main() -> None:
    """Run it; exits as mount(8) expects."""
    try:
        with reporting(as_json=False):
            source, mountpoint, file, settings = parse(sys.argv[1:])
            if "-f" not in sys.argv[1:]:  # mount(8): fake, everything but the system call
                start(mount_config(source, mountpoint, file, settings))
    except SystemExit as e:
        sys.exit(_FAILED if e.code else 0)
