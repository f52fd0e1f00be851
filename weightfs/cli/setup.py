"""`setup`: puts systemd's units and mount(8)'s helper in place for this installation, and takes them away again.

What is written says in its last line what it was when it was written. So a file that someone edited is known for what
it is, also after an upgrade, and is kept. The helper is a symlink, which can't be edited.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer

from weightfs import mounts
from weightfs.cli.options import Json
from weightfs.cli.output import emit, printable, reporting, say
from weightfs.config import STATE_BASE
from weightfs.errors import BusyError, UnfitError, UsageError, WeightfsError

UNITS: Final = ("weightfs.service", "weightfs@.service")
_UNIT_FOLDER: Final = "/etc/systemd/system"
_HELPER: Final = "/sbin/mount.weightfs"
_PROGRAM: Final = "/usr/local/bin/weightfs"
"""What the units name, until it is replaced by this installation's."""
_SEAL: Final = "# Written by `weightfs setup`; of the lines above: sha256 "
_PLAIN: Final = re.compile(r"[A-Za-z0-9/._+@-]+")


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do, or one that is left as it is.

    Attributes:
        action: `write`, `link`, `remove`, `run`, or `keep` and `unchanged`, which do nothing.
        target: the path it is about, or the command.
        reason: why, where that is not plain.
        do: carries it out; None does nothing.
    """

    action: str
    target: str
    reason: str | None = None
    do: Callable[[], object] | None = None


def setup(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Take away what it installed.")] = False,
    purge: Annotated[bool, typer.Option("--purge", help="With --remove: index, logs and snapshots too.")] = False,
    root: Annotated[str, typer.Option(hidden=True, help="Another root directory, such as an image.")] = "/",
    as_json: Json = False,
) -> None:
    """Install the systemd units and mount.weightfs, for mount(8) and /etc/fstab; or remove them.

    Example: weightfs setup --dry-run
    """
    with reporting(as_json=as_json):
        if purge and not remove:
            raise UsageError("--purge takes index and snapshots away", mend="it needs --remove beside it")
        place = _Place(os.path.abspath(root))
        steps = list(place.removal(purge=purge) if remove else place.installation())
        if not place.has_systemd:
            _tell("systemd does not run here: no units", as_json)
        for step in steps:
            _tell(_line(step), as_json)
            if step.do is not None and not dry_run:
                _carry_out(step)
        if as_json:
            rows = [{"action": step.action, "target": step.target, "reason": step.reason} for step in steps]
            emit({"dry_run": dry_run, "systemd": place.has_systemd, "steps": rows})


def _tell(line: str, as_json: bool) -> None:
    if as_json:
        sys.stderr.write(printable(line) + "\n")
    else:
        say(printable(line))
        sys.stdout.flush()


def _line(step: Step) -> str:
    return f"{step.action:9} {step.target}" + (f" ({step.reason})" if step.reason else "")


def _carry_out(step: Step) -> None:
    assert step.do is not None
    try:
        step.do()
    except PermissionError as e:
        raise UnfitError("only root may do that", path=step.target, mend="sudo weightfs setup") from e
    except OSError as e:
        raise WeightfsError(f"can't {step.action} it: {os.strerror(e.errno or 0)}", path=step.target) from e
    except subprocess.CalledProcessError as e:
        raise WeightfsError(f"failed: {e.stderr.decode(errors='replace').strip()}", path=step.target) from e


class _Place:
    """A root directory: `/`, or that of an image, in which nothing is run."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.has_systemd = os.path.isdir(self._at("/run/systemd/system"))

    def _at(self, path: str) -> str:
        return path if self._root == "/" else self._root + path

    def installation(self) -> Iterator[Step]:
        """What installs; a step for what is there already says so."""
        helper, program = _installed("mount.weightfs"), _installed("weightfs")
        changed = False
        if self.has_systemd:
            for name in UNITS:
                step = self._unit(name, unit_text(name, program))
                changed |= step.do is not None
                yield step
        link = self._at(_HELPER)
        if _link_target(link) == helper:
            yield Step("unchanged", link)
        elif os.path.lexists(link) and not _is_our_link(link):
            yield Step("keep", link, "it is not weightfs's")
        else:
            yield Step("link", link, f"to {helper}", lambda: _put(link, lambda new: os.symlink(helper, new)))
        if changed:
            yield from self._reload()

    def removal(self, *, purge: bool) -> Iterator[Step]:
        """What takes away what `installation` put there, and nothing else.

        Raises:
            BusyError: a unit is enabled, or with `purge` something is mounted.
        """
        changed = False
        for name in UNITS:
            path = self._at(f"{_UNIT_FOLDER}/{name}")
            if not os.path.lexists(path):
                continue
            if not _is_as_written(path):
                yield Step("keep", path, "it was edited; remove it by hand")
                continue
            self._refuse_if_enabled(name)
            changed = True
            yield Step("remove", path, None, lambda path=path: os.unlink(path))  # type: ignore[misc]
        link = self._at(_HELPER)
        if _is_our_link(link):
            yield Step("remove", link, None, lambda: os.unlink(link))
        elif os.path.lexists(link):
            yield Step("keep", link, "it is not weightfs's")
        if changed:
            yield from self._reload()
        state = self._at(STATE_BASE)
        if not os.path.isdir(state):
            return
        if not purge:
            yield Step("keep", state, "index, logs and snapshots; --purge removes them")
            return
        if self._root == "/" and (used := mounts.mounted()):
            raise BusyError("is mounted", path=used[0].mountpoint, mend=f"weightfs umount {used[0].mountpoint}")
        yield Step("remove", state, "index, logs and snapshots", lambda: shutil.rmtree(state))

    def _unit(self, name: str, text: str) -> Step:
        path = self._at(f"{_UNIT_FOLDER}/{name}")
        if _read(path) == text:
            return Step("unchanged", path)
        if os.path.lexists(path) and not _is_as_written(path):
            return Step("keep", path, "it was edited; move it away for the new one")
        return Step("write", path, None, lambda: _put(path, lambda new: _write(new, text)))

    def _reload(self) -> Iterator[Step]:
        systemctl = shutil.which("systemctl")
        if self._root == "/" and self.has_systemd and systemctl is not None:
            command = [systemctl, "daemon-reload"]
            yield Step("run", " ".join(command), None, lambda: subprocess.run(command, check=True, capture_output=True))

    def _refuse_if_enabled(self, name: str) -> None:
        """Its instances are links in the folders of what wants them: without the unit they would lead nowhere."""
        stem, suffix = os.path.splitext(name)
        folder = self._at(_UNIT_FOLDER)
        for wanting in sorted(os.listdir(folder)):
            if not wanting.endswith((".wants", ".requires")):
                continue
            for link in sorted(os.listdir(os.path.join(folder, wanting))):
                is_instance = stem.endswith("@") and link.startswith(stem)
                if link == name or (is_instance and link.endswith(suffix)):
                    raise BusyError("is enabled", path=link, mend=f"systemctl disable --now {link}")


def unit_text(name: str, program: str) -> str:
    """A unit of this installation, sealed.

    Raises:
        UnfitError: the program's path is none that a unit can name plainly.
    """
    if not _PLAIN.fullmatch(program):
        raise UnfitError("a systemd unit can't name that path", path=program, mend="install weightfs elsewhere")
    template = importlib.resources.files("weightfs.cli").joinpath("units", name).read_text(encoding="utf-8")
    return sealed(template.replace(_PROGRAM, program))


def sealed(text: str) -> str:
    """A text and a last line that tells whether it is still what it was."""
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _is_as_written(path: str) -> bool:
    text = _read(path) or ""
    above, seal, _ = text.rpartition(_SEAL)
    return bool(seal) and sealed(above) == text


def _installed(name: str) -> str:
    """A program of this installation.

    Raises:
        UnfitError: it was not installed as a package.
    """
    path = os.path.join(os.path.dirname(sys.executable), name)
    if not os.access(path, os.X_OK):
        raise UnfitError("is not installed beside its Python", path=path, mend="install weightfs with pip")
    return path


def _link_target(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _is_our_link(path: str) -> bool:
    return os.path.basename(_link_target(path) or "") == os.path.basename(_HELPER)


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return None


def _write(path: str, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o644)  # whatever the umask
        file.write(text)


def _put(path: str, make: Callable[[str], Any]) -> None:
    """Make it under another name and rename it: nobody sees half of it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fresh = f"{path}.new"
    if os.path.lexists(fresh):
        os.unlink(fresh)
    make(fresh)
    os.rename(fresh, path)
