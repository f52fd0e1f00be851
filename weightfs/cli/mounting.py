"""`mount`, `umount`, `status`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Annotated, Any, Final, NoReturn

import typer

from weightfs import linux, mounts, systemd
from weightfs.cli.options import Json
from weightfs.cli.output import announce, emit, fail, human_bytes, printable, reporting, say
from weightfs.config import MountConfig, mount_config
from weightfs.control import error_from
from weightfs.errors import BusyError, WeightfsError
from weightfs.supervision.replacement import ask_to_replace

_START_S: Final = 40.0
_STATUS_S: Final = 5.0
_END_S: Final = 5.0


def mount(
    source: Annotated[str, typer.Argument(help="Folder that holds the models.")],
    mountpoint: Annotated[str, typer.Argument(help="Existing folder to show them at.")],
    foreground: Annotated[bool, typer.Option("--foreground", help="Become the mount's supervisor.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take over from the weightfs mounted there; no request fails.")
    ] = False,
    engine: Annotated[str | None, typer.Option(help="auto, passthrough or portable.")] = None,
    allow_other: Annotated[
        bool | None, typer.Option("--allow-other/--no-allow-other", help="Other users too (root: yes).")
    ] = None,
    state_dir: Annotated[str | None, typer.Option(help="Folder for index and log.")] = None,
    metrics_listen: Annotated[str | None, typer.Option(help="HOST:PORT for Prometheus.")] = None,
    control_group: Annotated[str | None, typer.Option(help="Group that may use the control socket.")] = None,
    watch: Annotated[str | None, typer.Option(help="Watch folders for changes: auto or off.")] = None,
    prefetch: Annotated[str | None, typer.Option(help="Read ahead by layers, whole files, or off.")] = None,
    predict: Annotated[str | None, typer.Option(help="Read ahead what will likely be opened: auto or off.")] = None,
    pin_layers: Annotated[str | None, typer.Option(help="Layers to lock in memory, as 0-3.")] = None,
    memory_budget: Annotated[str | None, typer.Option(help="For models together, as 20GiB.")] = None,
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
            "control_group": control_group,
            "log_level": log_level,
            "watch": watch,
            "prefetch": prefetch,
            "predict": predict,
            "pin_layers": pin_layers,
            "memory_budget": memory_budget,
        }
        settings = mount_config(source, mountpoint, config, options)
        if replace and (running := _running(settings)):
            announce(replace_running(settings, running), as_json=as_json)
        elif foreground:
            _become_supervisor(settings, as_json)
        else:
            announce(start(settings), as_json=as_json)


def _become_supervisor(settings: MountConfig, as_json: bool) -> NoReturn:
    """This process, which a service manager may watch, is the supervisor from now on."""
    said = os.memfd_create("settings")
    os.write(said, json.dumps(dataclasses.asdict(settings)).encode())
    os.lseek(said, 0, os.SEEK_SET)
    os.dup2(said, 0)
    options = ["--foreground", *(["--json"] if as_json else [])]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "weightfs.cli.supervise", *options])


def _running(settings: MountConfig) -> mounts.Mounted | None:
    """The weightfs that is mounted where the settings say."""
    return mounts.find(settings.mountpoint)


def replace_running(settings: MountConfig, running: mounts.Mounted) -> dict[str, Any]:
    """Have this version take over a mount; gives its mount document.

    Raises:
        WeightfsError: it can't, and why; the mount goes on as it was.
    """
    if not os.path.exists(settings.supervisor_socket):
        raise WeightfsError(
            f"its supervisor does not listen at {settings.supervisor_socket}",
            path=running.mountpoint,
            mend="give the --state-dir that it was mounted with; a dead mount is taken away by mount without --replace",
        )
    return ask_to_replace(settings, _START_S)


def start(settings: MountConfig) -> dict[str, Any]:
    """Start a supervisor and wait until its daemon serves; gives the mount document.

    Raises:
        WeightfsError: what the daemon said before it ended.
        BusyError: it did not serve in time; it is ended.
    """
    reader, writer = os.pipe()
    arguments = [sys.executable, "-P", "-m", "weightfs.cli.supervise", "--outcome", str(writer)]
    with subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[writer],
        start_new_session=True,
        cwd="/",
    ) as supervisor:
        os.close(writer)
        assert supervisor.stdin is not None
        supervisor.stdin.write(json.dumps(dataclasses.asdict(settings)).encode())
        supervisor.stdin.close()
        said = _read_line(reader, _START_S)
        if said is None:
            supervisor.terminate()
            raise BusyError(f"did not serve within {_START_S:g} s", path=settings.mountpoint)
        if not said:
            raise WeightfsError(
                f"the supervisor ended with status {supervisor.wait()} before it served", mend=_log_hint(settings)
            )
        answer: dict[str, Any] = json.loads(said)
        if "error" in answer:
            supervisor.wait()
            raise error_from(answer["error"])
        # It goes on without us: nothing here waits for it any more.
        supervisor.returncode = 0
        return answer


def _log_hint(settings: MountConfig) -> str:
    return f"see {os.path.join(settings.state_folder, 'weightfs.log')}"


def _read_line(fd: int, timeout_s: float) -> bytes | None:
    """Everything until the other end closes or a newline comes; None when that takes too long."""
    said, ends = b"", time.monotonic() + timeout_s
    with open(fd, "rb", buffering=0) as pipe:
        while not said.endswith(b"\n"):
            if not linux.is_readable(pipe, max(0.0, ends - time.monotonic())):
                return None
            part = pipe.read(1 << 16)
            if not part:
                break
            said += part
    return said


def umount(
    mountpoint: Annotated[str, typer.Argument(help="Where it is mounted.")],
    lazy: Annotated[bool, typer.Option("--lazy", help="Take the name away now, let users finish.")] = False,
    if_stopping: Annotated[str | None, typer.Option(hidden=True)] = None,
    as_json: Json = False,
) -> None:
    """End a mount cleanly.

    Example: weightfs umount /models
    """
    with reporting(as_json=as_json):
        if if_stopping is not None and not systemd.is_stopping(if_stopping):
            return  # it is to be started again, and goes on with this mount
        here = find(mountpoint)
        said = status_of(here)
        if said is None and mounts.is_stuck(here.mountpoint):
            mounts.abort(here.mountpoint)
        pid = (said or {}).get("supervisor_pid")
        if mounts.find(here.mountpoint) == here:
            mounts.unmount(here.mountpoint, lazy=lazy)
        if pid is not None and not lazy and not end(pid):
            raise BusyError(f"is unmounted, but its supervisor {pid} has not ended yet", path=here.mountpoint)
        if as_json:
            emit({"mountpoint": here.mountpoint, "lazy": lazy})


def end(pid: int) -> bool:
    """Wait until the supervisor of a mount that is gone has ended; False when that takes too long."""
    try:
        supervisor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with open(supervisor, "rb", buffering=0) as handle:
        return linux.is_readable(handle, _END_S)


def find(mountpoint: str) -> mounts.Mounted:
    """The mount at that place.

    Raises:
        WeightfsError: there is none of ours.
    """
    # The folder above is resolved, not the mountpoint: asking a dead mount hangs or fails.
    above, last = os.path.split(os.path.abspath(mountpoint))
    path = os.path.join(os.path.realpath(above), last)
    here = mounts.find(path)
    if here is None:
        known = ", ".join(mount.mountpoint for mount in mounts.mounted()) or "none"
        raise WeightfsError("no weightfs is mounted there", path=path, mend=f"mounted are: {known}")
    return here


def status_of(here: mounts.Mounted) -> dict[str, Any] | None:
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
        wanted = [find(mountpoint)] if mountpoint else mounts.mounted()
        documents = []
        for here in wanted:
            said = status_of(here)
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
            error = BusyError("a mount does not answer", mend="weightfs umount --lazy, then mount again")
            fail(error, as_json=False)  # the one document on stdout is that of the mounts


def _show(said: dict[str, Any]) -> None:
    say(f"{printable(said['mountpoint'])} ({printable(said['source'])})")
    if said["engine"] is None:
        say("  does not answer")
        return
    say(f"  engine     {said['engine']} ({said['reason']}), daemon {said['daemon_pid']}, up {said['uptime_s']:.0f} s")
    say(
        f"  weights    {said['models']} files in memory, {said['headers_parsed']} headers parsed, {said['opens']} opens"
    )
    say(f"  bytes      {human_bytes(said['bytes_read'])} through user space; the rest the kernel read by itself")
    indexing = said["indexing"]
    state = "done" if indexing["done"] and not indexing["failure"] else indexing["failure"] or "goes on"
    say(
        f"  indexing   {printable(state)}: {indexing['files']} files in {indexing['folders']} folders, "
        f"{indexing['headers']} headers read in {indexing['seconds']:.1f} s"
    )
    if "watch" in said:  # a daemon of an older version says nothing of it
        _show_watch(said["watch"])
    if "prefetch" in said:  # a daemon of an older version says nothing of it
        _show_prefetch(said["prefetch"])
    if said["deaths"]:
        died = "1 daemon has died" if said["deaths"] == 1 else f"{said['deaths']} daemons have died"
        say(f"  deaths     {died} and been followed")
    for why, count in said["passthrough_refused"].items():
        say(f"  refused    passthrough for {count} opens: {why}")
    for path in said["changed_in_place"]:
        say(f"  changed    {printable(path)} was written to while it is open")
    for fault in said["faults"]:
        say(f"  fault      {printable(fault['path'])}: {printable(fault['message'])} (at byte {fault['offset']})")
    if said["index"]["set_aside"]:
        say(f"  index      {said['index']['set_aside'][0]} was unusable: {said['index']['set_aside'][1]}")


def _show_prefetch(state: dict[str, Any]) -> None:
    read, budget = human_bytes(state["filled_bytes"]), human_bytes(state["budget_bytes"])
    halted = f", halted: {state['halted']}" if state["halted"] else ""
    say(f"  prefetch   {state['mode']}: {read} read ahead, budget {budget}{halted}")
    for one in state["active"]:
        done = one["filled_bytes"] + one["found_bytes"]
        say(f"  reading    {printable(one['model'])}: {human_bytes(done)} of {human_bytes(one['bytes'])}")
    for one in state.get("failed", ()):
        say(f"  failed     {printable(one['model'])}: {printable(one['failure'])}")
    if (ahead := state.get("predicted")) is not None:
        _show_predicted(ahead)
    for one in state["models"]:
        part = f"{human_bytes(one['resident_bytes'])} of {human_bytes(one['bytes'])}"
        say(f"  in memory  {printable(one['model'])}: {part}")


def _show_predicted(state: dict[str, Any]) -> None:
    read, used, wasted = (human_bytes(state[f"{name}_bytes"]) for name in ("read", "used", "wasted"))
    waits = f", waits: {printable(state['waits_for'])}" if state["waits_for"] else ""
    say(f"  predicted  {read} read, {used} used, {wasted} in vain; {state['known']} models known{waits}")
    for one in state["models"]:
        part = f"{human_bytes(one['resident_bytes'])} of {human_bytes(one['bytes'])} in memory"
        likely = f"{one['probability']:.0%} within {state['window_s'] / 3600:g} h"
        say(f"  foretold   {printable(one['model'])}: {likely}, {part}")


def _show_watch(watch: dict[str, Any]) -> None:
    if watch["state"] == "off":
        say(f"  watch      off ({watch['reason']}): changes show after a moment")
        return
    say(f"  watch      {watch['folders']} folders, {watch['batches']} batches of changes")
    for why, count in watch["unwatched"].items():
        say(f"  unwatched  {count} folders: {why}")
