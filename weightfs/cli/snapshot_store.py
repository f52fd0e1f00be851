"""`snapshot list`, `show`, `verify`, `rm`, `prune`: what is in the store, without a process.

Each command loads this module, and `mount` is not to wait for what it does not use: `checkpoint` is imported where it
is needed.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from weightfs.cli.options import Json
from weightfs.cli.output import emit, fail_for, human_bytes, printable, reporting, say
from weightfs.cli.snapshot_keys import Keys, keyed
from weightfs.errors import UnfitError, UsageError, WeightfsError
from weightfs.sizes import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from checkpoint.chunks.keys import MasterKey
    from checkpoint.fingerprint import Difference, Fingerprint
    from checkpoint.manifest import Manifest
    from checkpoint.store import Listed, Snapshot, Store

DEFAULT_STORE: Final = "/var/lib/weightfs/snapshots"
_FACTS: Final = 11
_CONTENT: Final = {"plain": "CRIU's images as they are", "recipes": "recipes, and chunks that were new to the store"}

StoreFolder = Annotated[str, typer.Option("--store", help="Folder that holds the snapshots.")]
Names = Annotated[list[str], typer.Argument(help="Snapshots.", metavar="NAME...")]


def list_snapshots(store: StoreFolder = DEFAULT_STORE, as_json: Json = False) -> None:
    """List the snapshots, and say which of them fit this machine.

    Example: weightfs snapshot list --json
    """
    with reporting(as_json=as_json):
        here = _here()
        rows = [_row(one, here) for one in _open(store).list()]
        if as_json:
            emit({"snapshots": rows})
            return
        if not rows:
            say(f"no snapshots in {printable(store)}")
            return
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            if row["created"] is None:
                say(f"{row['name']:{width}}  can't be used: {printable(row['reason'])}")
                continue
            fits = "fits" if row["fits"] else f"does not fit: {printable(row['reason'])}"
            sizes = f"{human_bytes(row['bytes_stored']):>10} of {human_bytes(row['bytes_logical']):<10}"
            say(f"{row['name']:{width}}  {row['created']}  {sizes}  {fits}")


def show(
    name: Annotated[str, typer.Argument(help="Snapshot.")], store: StoreFolder = DEFAULT_STORE, as_json: Json = False
) -> None:
    """Tell all that is known of a snapshot, and what differs on this machine. Its images are not read.

    Example: weightfs snapshot show llama
    """
    with reporting(as_json=as_json):
        import msgspec

        snapshot = _open(store).open(name)
        differences, reason = _differences(snapshot.manifest, _here())
        if as_json:
            emit(
                {
                    **_row_of(snapshot, reason),
                    "differences": [msgspec.to_builtins(one) for one in differences],
                    "manifest": msgspec.to_builtins(snapshot.manifest),
                }
            )
            return
        _print_facts(snapshot)
        if reason is not None:
            say(f"does not fit this machine: {printable(reason)}")
        else:
            say("fits this machine")
        if differences:
            _print_differences(differences)


@keyed
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Snapshots; all that are sealed so unless told.", metavar="[NAME...]")
    ] = None,
    store: StoreFolder = DEFAULT_STORE,
    *,
    keys: Keys,
    as_json: Json = False,
) -> None:
    """Read every byte of snapshots and compare it with what was written. Exits 4 when one is damaged.

    Without a name it verifies all that are encrypted, or with --no-encrypt all that are not, and names the others.

    Example: weightfs snapshot verify llama --key-file /etc/weightfs/key
    """
    with reporting(as_json=as_json):
        master = keys.master()
        opened = _open(store)
        wanted, others = (names, []) if names else _sealed_so(opened, is_encrypted=master is not None)
        verdicts = [_verdict(opened, name, master) for name in wanted]
        for name in others:
            why = "is not encrypted" if master is not None else "is encrypted"
            sys.stderr.write(printable(f"weightfs: {name} is not verified, for it {why}") + "\n")
        if as_json:
            document = {"ok": all(one["ok"] for one, _ in verdicts), "snapshots": [one for one, _ in verdicts]}
            emit(document | {"not_verified": others})
        else:
            for one, _ in verdicts:
                if one["ok"]:
                    speed = human_bytes(round(one["bytes"] / max(one["seconds"], 0.001)))
                    say(f"{one['name']}: {human_bytes(one['bytes'])} are as they were written ({speed}/s)")
        fail_for([error for _, error in verdicts if error is not None])


def rm(names: Names, store: StoreFolder = DEFAULT_STORE, as_json: Json = False) -> None:
    """Remove snapshots, damaged ones too. One that is being restored stays, and the exit code is 75.

    Chunks that no other snapshot needs go with the next `weightfs snapshot prune`.

    Example: weightfs snapshot rm llama-old
    """
    with reporting(as_json=as_json):
        removed, failed = _remove(_open(store), names)
        as_error = as_json and bool(failed) and not removed
        if as_json and not as_error:
            emit({"removed": removed, "failed": [str(error) for error in failed]})
        elif not as_json:
            for name in removed:
                say(f"{name}: removed")
        fail_for(failed, as_json=as_error)


@keyed
def prune(
    keep_last: Annotated[int | None, typer.Option(min=0, help="The newest that stay in any case.")] = None,
    older_than: Annotated[str | None, typer.Option(help="Remove what is older than this, as 7d or 12h.")] = None,
    max_size: Annotated[str | None, typer.Option(help="Remove the oldest down to this, as 200GiB.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    store: StoreFolder = DEFAULT_STORE,
    *,
    keys: Keys,
    as_json: Json = False,
) -> None:
    """Remove old snapshots: for cron. With --keep-last alone, all but so many of the newest go.

    Then chunks that no snapshot needs go: those that are encrypted where the key is given, others always. With a key
    or --no-encrypt alone nothing else goes.

    One that can't be used stays, for nobody knows how old it is. One that is being restored stays, and the exit code is
    75, once all others are gone.

    Example: weightfs snapshot prune --keep-last 2 --older-than 7d --max-size 200GiB
    """
    with reporting(as_json=as_json):
        from checkpoint.retention import Kept, choose

        has_rule = (keep_last, older_than, max_size) != (None, None, None)
        if not has_rule and not keys.names_one and not keys.no_encrypt:
            raise UsageError(
                "nothing says what may go", mend="give --keep-last, --older-than or --max-size, or several"
            )
        master = keys._replace(no_encrypt=keys.no_encrypt or not keys.names_one).master()
        opened = _open(store)
        usable = {one.name: one.snapshot for one in opened.list() if one.snapshot is not None}
        chosen = choose(
            [
                Kept(name=name, created_ns=one.manifest.created_ns, nbytes=one.bytes_stored)
                for name, one in usable.items()
            ],
            keep_last=keep_last,
            older_than_s=None if older_than is None else parse_seconds(older_than),
            max_bytes=None if max_size is None else parse_bytes(max_size),
            now_ns=time.time_ns(),
        )
        removed, failed = (list(chosen), []) if dry_run else _remove(opened, chosen)
        kept = sorted(set(usable) - set(removed))
        freed = sum(usable[name].bytes_stored for name in removed)
        if not dry_run:
            freed += _collected(opened, master, failed) - sum(usable[name].manifest.bytes_added for name in removed)
            if not keys.names_one and any(usable[name].manifest.is_encrypted for name in removed):
                sys.stderr.write("weightfs: encrypted chunks stay until prune is given their key\n")
        if as_json:
            emit({"removed": removed, "kept": kept, "bytes_freed": freed, "dry_run": dry_run})
        else:
            for name in removed:
                say(f"{name}: {'would be ' if dry_run else ''}removed")
            verb = "would be freed" if dry_run else "freed"
            say(f"{len(removed)} removed, {len(kept)} stay, {human_bytes(freed)} {verb}")
        fail_for(failed)


def _sealed_so(store: Store, *, is_encrypted: bool) -> tuple[list[str], list[str]]:
    """The names of snapshots that are encrypted, or are not, and of the others; first also those that can't be used."""
    wanted: list[str] = []
    others: list[str] = []
    for one in store.list():
        is_so = one.snapshot is None or one.snapshot.manifest.is_encrypted is is_encrypted
        (wanted if is_so else others).append(one.name)
    return wanted, others


def _open(store: str) -> Store:
    from checkpoint.store import Store

    return Store(store)


def _row(one: Listed, here: Fingerprint | UnfitError) -> dict[str, Any]:
    """What `list` says of a name."""
    if one.snapshot is not None:
        return _row_of(one.snapshot, _differences(one.snapshot.manifest, here)[1])
    nothing = dict.fromkeys(("id", "created", "bytes_logical", "bytes_stored"))
    return {"name": one.name, **nothing, "fits": False, "reason": str(one.fault)}


def _row_of(snapshot: Snapshot, reason: str | None) -> dict[str, Any]:
    manifest = snapshot.manifest
    return {
        "name": manifest.name,
        "id": manifest.id,
        "created": _when(manifest.created_ns),
        "bytes_logical": manifest.bytes_logical,
        "bytes_stored": snapshot.bytes_stored,
        "fits": reason is None,
        "reason": reason,
    }


def _here() -> Fingerprint | UnfitError:
    """This machine's fingerprint, its mountpoints apart, or why nothing fits it."""
    from checkpoint.machine import fingerprint_here

    try:
        return fingerprint_here()
    except UnfitError as e:
        return e


def _differences(manifest: Manifest, here: Fingerprint | UnfitError) -> tuple[list[Difference], str | None]:
    """What differs here, and why the snapshot does not fit; None where it does."""
    import msgspec

    from checkpoint.fingerprint import compare, misfit
    from weightfs import mounts

    if isinstance(here, UnfitError):
        return [], here.message
    wanted = manifest.fingerprint.mountpoint
    is_mounted = wanted is not None and mounts.find(wanted) is not None
    here = msgspec.structs.replace(here, mountpoint=wanted if is_mounted else None)
    differences = compare(manifest.fingerprint, here, uses_gpu=bool(manifest.cuda_pids))
    return differences, misfit(differences)


def _verdict(store: Store, name: str, master: MasterKey | None) -> tuple[dict[str, Any], WeightfsError | None]:
    started = time.monotonic()
    try:
        snapshot = store.verify(name, master)
    except WeightfsError as e:
        return {"name": name, "ok": False, "bytes": None, "seconds": None, "fault": str(e)}, e
    seconds = time.monotonic() - started
    nbytes = snapshot.manifest.bytes_logical
    return {"name": name, "ok": True, "bytes": nbytes, "seconds": round(seconds, 3), "fault": None}, None


def _remove(store: Store, names: Iterable[str]) -> tuple[list[str], list[WeightfsError]]:
    """Remove what can be; gives the names of those that are gone, and why others are not."""
    removed, failed = [], []
    for name in names:
        try:
            store.remove(name)
        except WeightfsError as e:
            failed.append(e)
        else:
            removed.append(name)
    return removed, failed


def _collected(store: Store, master: MasterKey | None, failed: list[WeightfsError]) -> int:
    """Remove chunks that nobody needs; gives how many bytes that were, and adds to `failed` what was in the way."""
    freed = 0
    for key in dict.fromkeys((None, master)):
        try:
            pruned = store.collect(key)
        except WeightfsError as e:
            failed.append(e)
        else:
            freed += pruned.freed_nbytes
            failed += pruned.faults.values()
    return freed


def _when(created_ns: int) -> str:
    """A time as ISO 8601 has it, in UTC and whole seconds; the last one there is where it is beyond."""
    try:
        moment = datetime.datetime.fromtimestamp(created_ns // 10**9, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return "9999-12-31T23:59:59Z"
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _print_facts(snapshot: Snapshot) -> None:
    manifest = snapshot.manifest
    weights_bytes = sum(one.nbytes for one in manifest.weights)
    mount = manifest.mount
    facts = {
        "name": manifest.name,
        "id": manifest.id,
        "created": _when(manifest.created_ns),
        "command": " ".join(manifest.command),
        "processes": f"{len(manifest.pids)}, {len(manifest.cuda_pids)} of them with CUDA; root {manifest.root_pid}",
        "images": f"{human_bytes(manifest.bytes_logical)} in {len(manifest.files)} files"
        + "".join(f", {human_bytes(nbytes)} {kind}" for kind, nbytes in manifest.bytes_by_kind.items()),
        "stored": f"{human_bytes(snapshot.bytes_stored)}: {_CONTENT[manifest.content]}, "
        + (f"encrypted with the key {_key_id(snapshot)}" if manifest.is_encrypted else "not encrypted"),
        "weights": f"{human_bytes(weights_bytes)} in {len(manifest.weights)} files"
        + (f" on {mount.mountpoint} (of {mount.source})" if mount else ""),
        "listens": ", ".join(manifest.listeners) or "nowhere",
        "hooks": "it said itself that it was warm"
        if manifest.hooks
        else "none: restored twice, both have the same state",
        "generation": f"{manifest.generation}",
    }
    for what, value in facts.items():
        say(f"{what:>{_FACTS}}  {printable(value)}")
    for name, seconds in manifest.phases.items():
        say(f"{printable(name):>{_FACTS}}  {seconds:.3f} s")


def _key_id(snapshot: Snapshot) -> str:
    from checkpoint.contents import key_id

    return key_id(snapshot)


def _print_differences(differences: list[Difference]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("differs", "matters", "snapshot", "here", "why"):
        table.add_column(heading, overflow="fold")
    for one in sorted(differences, key=lambda one: not one.matters):
        cells = (one.what, "yes" if one.matters else "no", one.snapshot, one.here, one.why)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    width = None if sys.stdout.isatty() else 160
    Console(width=width, highlight=False).print(table)
