"""`record`: run a loader on a mount that sees every read, and keep the order in which it wanted the model."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

import typer

from prefetch.learning import learn
from prefetch.orders import write_order
from prefetch.plan import Extent
from weightfs import model, mounts
from weightfs.cli.mounting import end, start
from weightfs.cli.options import Json
from weightfs.cli.output import emit, human_bytes, printable, reporting
from weightfs.cli.placing import SCRATCH, Home, home_below, home_of
from weightfs.config import MountConfig
from weightfs.control import ask
from weightfs.errors import UsageError, WeightfsError
from weightfs.formats.layout import WeightLayout

_ANSWER_S: Final = 30.0
_FETCH_S: Final = 0.5
_READAHEAD_KIB: Final = 128
"""The stock value, not the mount's usual one: what the kernel reads ahead nobody asked for."""
_FAMILIES: Final = ("transformers", "vllm", "sglang", "diffusers", "llama.cpp", "safetensors", "gguf")
_NOT_FOUND: Final = 127
_NOT_STARTED: Final = 126


def record(
    path: Annotated[str, typer.Argument(help="A weight file or model folder, mounted or not.", metavar="MODEL")],
    command: Annotated[
        list[str],
        typer.Argument(help="Loads it; {} and MODEL in it are replaced.", metavar="-- COMMAND..."),
    ],
    loader: Annotated[str | None, typer.Option(help="What the order is of; told from COMMAND when left out.")] = None,
    source: Annotated[str | None, typer.Option(help="The source, when no mount shows the model.")] = None,
    as_json: Json = False,
) -> None:
    """Learn the order in which COMMAND reads a model; later plans follow it. Exits as COMMAND does.

    Example: weightfs record /models/llama -- python serve.py --model /models/llama
    """
    with reporting(as_json=as_json):
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        home = home_of(folder) if source is None else home_below(source, folder)
        if home is None:
            where = "the source of no mount" if source is None else f"no folder of {source}"
            raise WeightfsError(f"lies in {where}", path=path, mend="mount it, or name its --source")
        layouts = [model.file_layout(path)] if folder != path else list(model.folder_layouts(path).values())
        if not layouts:
            raise WeightfsError("holds no weight files", path=path)
        family = loader or family_of(command)
        name = "" if folder == path else os.path.basename(path)
        with _Recording(home) as recording:
            status = _run(replaced(command, path, recording.path(name)), recording, as_json=as_json)
            reads = recording.reads(layouts)
        found: list[dict[str, Any]] = []
        for layout, sizes, seen in reads if status == 0 else []:
            if learned := learn(layout, sizes, seen):
                kept = write_order(home.state_folder, home.folder, family, learned)
                found.append({"files": list(layout.files), "extents": len(learned), "reads": len(seen),
                              "bytes": sum(one.nbytes for one in learned), "kept": kept})  # fmt: skip
        if as_json:
            emit({"model": home.folder, "loader": family, "status": status, "orders": found})
        _tell(found, family, status)
    sys.exit(status)


def family_of(command: Sequence[str]) -> str:
    """What kind of loader a command runs: one whose name is in it, else its program."""
    text = " ".join(command)
    return next((one for one in _FAMILIES if one in text), os.path.basename(command[0]))


def replaced(command: Sequence[str], path: str, shown: str) -> list[str]:
    """The command with the model's path, or `{}` as an argument of its own, replaced.

    A path is replaced where it is an argument or the beginning of one, and an absolute one within an argument too, when
    no longer name is meant.

    Raises:
        UsageError: neither is in it.
    """
    asked, full = path.rstrip("/") or "/", os.path.abspath(path)
    within = re.compile(rf"(?<![\w./-]){re.escape(full)}(?![\w.-])")
    made = []
    for one in command:
        if one == "{}":
            made.append(shown)
        elif one == asked or one.startswith(asked.rstrip("/") + "/"):
            made.append(shown + one[len(asked.rstrip("/")) :])
        else:
            made.append(within.sub(lambda _: shown, one))
    if made == list(command):
        raise UsageError("the command does not name the model", path=path, mend="write {} where its path belongs")
    return made


def _tell(found: Sequence[Mapping[str, Any]], family: str, status: int) -> None:
    """On stderr: what the command said is on stdout."""
    if status:
        lines = [f"nothing is learned from a command that ended with {status}"]
    elif not found:
        lines = ["nothing is learned: the command read no weights through the path it was given"]
    else:
        lines = [
            f"{printable(', '.join(one['files']))}: order of {printable(family)} kept, {one['reads']} reads, "
            f"{one['extents']} extents, {human_bytes(one['bytes'])}"
            for one in found
        ]
    for line in lines:
        sys.stderr.write(f"weightfs: {line}\n")


class _Recording:
    """A private mount whose every READ is noted. Shows the model's folder, and no more of the source than it links to.

    Args:
        home: the model's folder.
    """

    def __init__(self, home: Home) -> None:
        # Indexing a large library would take longer than the load.
        real = os.path.realpath(home.path)
        targets = [os.path.dirname(os.path.realpath(entry.path)) for entry in os.scandir(real) if entry.is_file()]
        inside = [one for one in targets if (one + "/").startswith(home.source.rstrip("/") + "/")]
        self._source = os.path.commonpath([real, *inside])
        self._below = os.path.relpath(real, self._source)
        self._scratch = tempfile.mkdtemp(prefix=SCRATCH)
        self._mountpoint = os.path.join(self._scratch, os.path.basename(self._source) or "models")
        self._socket = ""
        self._supervisor = 0
        self._seen: list[list[int]] = []
        self._ended = threading.Event()
        self._failure: WeightfsError | None = None

    def path(self, name: str) -> str:
        """Where the model's folder is shown, or a file in it."""
        return os.path.normpath(os.path.join(self._mountpoint, self._below, name))

    def __enter__(self) -> _Recording:
        try:
            os.mkdir(self._mountpoint)
            settings = MountConfig(
                source=self._source,
                mountpoint=self._mountpoint,
                engine="portable",
                allow_other=False,
                state_dir=os.path.join(self._scratch, "state"),
                prefetch="off",
            )
            self._supervisor = int(start(settings)["supervisor_pid"])
            self._socket = settings.control_socket
            self._fetch()  # from now on they are noted
            if (here := mounts.find(self._mountpoint)) is not None:
                mounts.raise_readahead(here, _READAHEAD_KIB)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._supervisor:
            with contextlib.suppress(WeightfsError):
                mounts.unmount(self._mountpoint, lazy=True)
            if not end(self._supervisor):
                # A mount namespace that was made meanwhile has a copy of the mount, which would keep it alive.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._supervisor, signal.SIGTERM)
                end(self._supervisor)
        shutil.rmtree(self._scratch, ignore_errors=True)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Fetch what is noted while the block runs: the daemon keeps a bounded number."""
        thread = threading.Thread(target=self._watch, name="reads", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
        self._watch()
        if self._failure is not None:
            raise self._failure

    def _watch(self) -> None:
        try:
            while not self._ended.wait(_FETCH_S):
                self._fetch()
            self._fetch()
        except WeightfsError as e:
            self._failure = e

    def _fetch(self) -> None:
        while True:
            answer = ask(self._socket, {"command": "reads"}, _ANSWER_S)
            if answer["passed_over"]:
                raise WeightfsError(f"{answer['passed_over']} reads came too fast to be noted", path=self._mountpoint)
            self._seen += answer["reads"]
            if not answer["reads"]:
                return

    def reads(self, layouts: Sequence[WeightLayout]) -> list[tuple[WeightLayout, dict[str, int], list[Extent]]]:
        """Each model with the sizes of its files and the reads of them, in their order."""
        found = []
        for layout in layouts:
            entries = {file: os.stat(self.path(file)) for file in layout.files}
            names = {entry.st_ino: file for file, entry in entries.items()}
            seen = [Extent(names[inode], offset, nbytes) for inode, offset, nbytes in self._seen if inode in names]
            found.append((layout, {file: entry.st_size for file, entry in entries.items()}, seen))
        return found


def _run(command: Sequence[str], recording: _Recording, *, as_json: bool) -> int:
    """The command's exit status, as a shell has it. With `as_json` its stdout is our stderr."""
    with recording.watching():
        try:
            process = subprocess.Popen(command, stdout=sys.stderr if as_json else None)
        except OSError as e:
            sys.stderr.write(f"weightfs: {printable(command[0])}: {os.strerror(e.errno or 0)}\n")
            return _NOT_FOUND if isinstance(e, FileNotFoundError) else _NOT_STARTED
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:  # the command has it too, and decides
                continue
    return status if status >= 0 else 128 - status
