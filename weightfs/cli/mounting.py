"""`mount`, `umount`, `status`."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from typing import Annotated, Any, Final

import typer

from weightfs import mounts
from weightfs.cli.output import emit, human_bytes, printable, reporting, say
from weightfs.config import MountConfig, mount_config
from weightfs.errors import BusyError, WeightfsError

_START_S: Final = 40.0
_STATUS_S: Final = 5.0
_END_S: Final = 5.0
_LOG_BYTES: Final = 10 << 20

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def mount(
    source: Annotated[str, typer.Argument(help="Folder that holds the models.")],
    mountpoint: Annotated[str, typer.Argument(help="Existing folder to show them at.")],
    foreground: Annotated[bool, typer.Option("--foreground", help="Serve in this process.")] = False,
    engine: Annotated[str | None, typer.Option(help="auto, passthrough or portable.")] = None,
    allow_other: Annotated[
        bool | None, typer.Option("--allow-other/--no-allow-other", help="Other users too (root: yes).")
    ] = None,
    state_dir: Annotated[str | None, typer.Option(help="Folder for index and log.")] = None,
    metrics_listen: Annotated[str | None, typer.Option(help="HOST:PORT for Prometheus.")] = None,
    watch: Annotated[str | None, typer.Option(help="Watch folders for changes: auto or off.")] = None,
    config: Annotated[str | None, typer.Option(help="TOML file with the same names.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    as_json: Json = False,
) -> None:
    """Show SOURCE at MOUNTPOINT; returns once it answers.

    Example: weightfs mount /srv/models /models
    """
    with reporting(as_json=as_json):
        options = {
            "engine": engine,
            "allow_other": allow_other,
            "state_dir": os.path.abspath(state_dir) if state_dir else None,
            "metrics_listen": metrics_listen,
            "log_level": log_level,
            "watch": watch,
        }
        settings = mount_config(source, mountpoint, config, options)
        if foreground:
            serve_here(settings, lambda document: _announce(document, as_json))
        else:
            _announce(start(settings), as_json)


def _announce(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit(document)
    else:
        say(
            f"{document['source']} on {document['mountpoint']}: {document['engine']} engine "
            f"({document['reason']}), pid {document['daemon_pid']}"
        )
        sys.stdout.flush()


def serve_here(settings: MountConfig, mounted: Any, log_file: str | None = None) -> None:
    """Serve in this process until it ends."""
    from weightfs.service import serve

    logging.basicConfig(
        filename=log_file,
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    serve(settings, mounted)


def start(settings: MountConfig) -> dict[str, Any]:
    """Start a daemon and wait until it serves; gives its mount document.

    Raises:
        WeightfsError: what the daemon said before it ended.
        BusyError: it did not serve in time; it is ended.
    """
    reader, writer = os.pipe()
    arguments = [sys.executable, "-m", "weightfs.cli.daemon", str(writer)]
    with subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[writer],
        start_new_session=True,
        cwd="/",
    ) as daemon:
        os.close(writer)
        assert daemon.stdin is not None
        fields = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
        daemon.stdin.write(json.dumps(fields).encode())
        daemon.stdin.close()
        said = _read_line(reader, _START_S)
        if said is None:
            daemon.terminate()
            raise BusyError(f"did not serve within {_START_S:g} s", path=settings.mountpoint)
        if not said:
            raise WeightfsError(
                f"the daemon ended with status {daemon.wait()} before it served", mend=_log_hint(settings)
            )
        answer: dict[str, Any] = json.loads(said)
        if "error" in answer:
            daemon.wait()
            raise _raised(answer["error"])
        # It goes on without us: nothing here waits for it any more.
        daemon.returncode = 0
        return answer


def _raised(error: dict[str, Any]) -> WeightfsError:
    found = WeightfsError(error["message"], path=error["path"], mend=error["mend"])
    found.exit_code = error["exit_code"]  # type: ignore[misc]
    found.code = error["code"]  # type: ignore[misc]
    return found


def _log_hint(settings: MountConfig) -> str:
    return f"see {os.path.join(settings.state_folder, 'weightfs.log')}"


def _read_line(fd: int, timeout_s: float) -> bytes | None:
    """Everything until the other end closes or a newline comes; None when that takes too long."""
    said, ends = b"", time.monotonic() + timeout_s
    with open(fd, "rb", buffering=0) as pipe:
        while not said.endswith(b"\n"):
            readable, _, _ = select.select([pipe], [], [], max(0.0, ends - time.monotonic()))
            if not readable:
                return None
            part = pipe.read(1 << 16)
            if not part:
                break
            said += part
    return said


def umount(
    mountpoint: Annotated[str, typer.Argument(help="Where it is mounted.")],
    lazy: Annotated[bool, typer.Option("--lazy", help="Take the name away now, let users finish.")] = False,
    as_json: Json = False,
) -> None:
    """End a mount cleanly.

    Example: weightfs umount /models
    """
    with reporting(as_json=as_json):
        here = _find(mountpoint)
        pid = (_status_of(here) or {}).get("daemon_pid")
        mounts.unmount(here.mountpoint, lazy=lazy)
        if pid is not None and not lazy and not end(pid):
            raise BusyError(f"is unmounted, but its daemon {pid} has not ended yet", path=here.mountpoint)
        if as_json:
            emit({"mountpoint": here.mountpoint, "lazy": lazy})


def end(pid: int) -> bool:
    """Wait until a daemon whose mount is gone has ended; False when that takes too long."""
    try:
        daemon = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with open(daemon, "rb", buffering=0) as handle:
        return bool(select.select([handle], [], [], _END_S)[0])


def _find(mountpoint: str) -> mounts.Mounted:
    # The folder above is resolved, not the mountpoint: asking a dead mount hangs or fails.
    above, last = os.path.split(os.path.abspath(mountpoint))
    path = os.path.join(os.path.realpath(above), last)
    here = mounts.find(path)
    if here is None:
        known = ", ".join(mount.mountpoint for mount in mounts.mounted()) or "none"
        raise WeightfsError("no weightfs is mounted there", path=path, mend=f"mounted are: {known}")
    return here


def _status_of(here: mounts.Mounted) -> dict[str, Any] | None:
    """What a mount says of itself; None when it does not answer. A child asks: a dead mount may hold its asker."""
    asker = subprocess.Popen(
        ["cat", os.path.join(here.mountpoint, ".weightfs", "status.json")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        text, _ = asker.communicate(timeout=_STATUS_S)
        return dict(json.loads(text)) if asker.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError):
        asker.kill()
        return None


def status(
    mountpoint: Annotated[str | None, typer.Argument(help="One mount; all when left out.")] = None,
    as_json: Json = False,
) -> None:
    """Show what mounts do: engine, uptime, models, bytes by path, faults.

    Example: weightfs status /models --json
    """
    with reporting(as_json=as_json):
        wanted = [_find(mountpoint)] if mountpoint else mounts.mounted()
        documents = []
        for here in wanted:
            said = _status_of(here)
            if said is None:
                said = {"mountpoint": here.mountpoint, "source": here.source, "engine": None, "reason": "no answer"}
            said.pop("schema", None)
            documents.append(said)
        if as_json:
            emit({"mounts": documents})
        else:
            for said in documents:
                _show(said)
        if any(said["engine"] is None for said in documents):
            raise BusyError("a mount does not answer", mend="weightfs umount --lazy, then mount again")


def _show(said: dict[str, Any]) -> None:
    say(f"{printable(said['mountpoint'])} ({printable(said['source'])})")
    if said["engine"] is None:
        say("  does not answer")
        return
    say(f"  engine     {said['engine']} ({said['reason']}), pid {said['daemon_pid']}, up {said['uptime_s']:.0f} s")
    say(
        f"  weights    {said['models']} files in memory, {said['headers_parsed']} headers parsed, {said['opens']} opens"
    )
    say(f"  bytes      {human_bytes(said['bytes_read'])} through user space; the rest the kernel read by itself")
    if "watch" in said:  # a daemon of an older version says nothing of it
        _show_watch(said["watch"])
    for why, count in said["passthrough_refused"].items():
        say(f"  refused    passthrough for {count} opens: {why}")
    for path in said["changed_in_place"]:
        say(f"  changed    {printable(path)} was written to while it is open")
    for fault in said["faults"]:
        say(f"  fault      {printable(fault['path'])}: {printable(fault['message'])} (at byte {fault['offset']})")
    if said["index"]["set_aside"]:
        say(f"  index      {said['index']['set_aside'][0]} was unusable: {said['index']['set_aside'][1]}")


def _show_watch(watch: dict[str, Any]) -> None:
    if watch["state"] == "off":
        say(f"  watch      off ({watch['reason']}): changes show after a moment")
        return
    say(f"  watch      {watch['folders']} folders, {watch['batches']} batches of changes")
    for why, count in watch["unwatched"].items():
        say(f"  unwatched  {count} folders: {why}")
