"""`ls`, `verify`, `doctor`: look without mounting."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from prefetch.orders import read_order
from prefetch.plan import Layer, Plan, plan_of
from weightfs import model
from weightfs.cli.mounting import end, start
from weightfs.cli.options import Json
from weightfs.cli.output import emit, human_bytes, printable, reporting, say
from weightfs.cli.placing import home_of
from weightfs.errors import IntegrityError, UnfitError, WeightfsError
from weightfs.formats.layout import TensorExtent, WeightLayout


def ls(
    path: Annotated[str, typer.Argument(help="A weight file, or a folder that holds some.")],
    order: Annotated[bool, typer.Option("--order", help="The order in which prefetch reads it.")] = False,
    as_json: Json = False,
) -> None:
    """List the tensors of a weight file or model folder, mounted or not.

    Example: weightfs ls /models/llama --json
    """
    with reporting(as_json=as_json):
        if os.path.isdir(path):
            layouts = model.folder_layouts(path)
            if not layouts:
                raise WeightfsError("holds no weight files", path=path)
        else:
            layouts = {os.path.basename(path): model.file_layout(path)}
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        plans = {name: _plan(folder, layout) for name, layout in layouts.items()} if order else {}
        if as_json:
            tensors = [_row(tensor) for layout in layouts.values() for tensor in layout.tensors]
            emit({"tensors": tensors, **({"order": [_step(layer) for plan in plans.values() for layer in plan.steps()]}
                                         if order else {})})  # fmt: skip
            return
        for name, plan in plans.items():
            say(f"{printable(name)}: {human_bytes(plan.nbytes)}, read in this order")
            for layer in plan.steps():
                reads = ", ".join(f"{one.file} {one.offset:,}+{one.nbytes:,}" for one in layer.extents)
                say(f"  {layer.label:>16} {human_bytes(layer.nbytes):>10}  {printable(reads)}")
        if order:
            return
        for name, layout in layouts.items():
            _print_layout(name, layout)


def _plan(folder: str, layout: WeightLayout) -> Plan:
    try:
        sizes = {file: os.path.getsize(os.path.join(folder, file)) for file in layout.files}
    except OSError as e:
        raise WeightfsError(f"can't be examined: {os.strerror(e.errno or 0)}", path=e.filename) from e
    home = home_of(folder or ".")
    learned = None if home is None else read_order(home.state_folder, home.folder, layout.files)
    return plan_of(layout, sizes, learned)


def _step(layer: Layer) -> dict[str, Any]:
    extents = [{"file": one.file, "offset": one.offset, "nbytes": one.nbytes} for one in layer.extents]
    return {"layer": layer.label, "bytes": layer.nbytes, "extents": extents}


def _row(tensor: TensorExtent) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "nbytes": tensor.nbytes,
        "layer": tensor.layer,
        "role": tensor.role.value,
        "file": tensor.file,
        "offset": tensor.offset,
    }


def _print_layout(name: str, layout: WeightLayout) -> None:
    # Here, as in `doctor`: each command loads this module, and `mount` is not to wait for what it does not use.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, side in (("tensor", "left"), ("dtype", "left"), ("shape", "left"), ("bytes", "right"),
                          ("layer", "right"), ("file", "left"), ("offset", "right")):  # fmt: skip
        table.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
    for tensor in layout.tensors:
        place = str(tensor.layer) if tensor.layer is not None else tensor.role.value
        cells = (
            tensor.name, tensor.dtype, "x".join(map(str, tensor.shape)) or "scalar",
            f"{tensor.nbytes:,}", place, tensor.file, f"{tensor.offset:,}",
        )  # fmt: skip
        # Text, not markup; and names are a stranger's bytes, which must not steer the terminal.
        table.add_row(*(Text(printable(cell)) for cell in cells))
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False).print(table)
    count, files = len(layout.tensors), len(layout.files)
    say(f"{printable(name)}: {count} tensors, {human_bytes(layout.nbytes)} in {files} file{'s' * (files != 1)}")


def verify(
    paths: Annotated[list[str], typer.Argument(help="Weight files or folders.", metavar="PATH...")],
    as_json: Json = False,
) -> None:
    """Check that headers describe their files: bounds, overlaps, shards. Exits 4 when one does not.

    Example: weightfs verify /srv/models --json
    """
    with reporting(as_json=as_json):
        verdicts = [verdict for path in paths for verdict in model.verify(path)]
        faulty = [verdict for verdict in verdicts if not verdict.ok]
        if as_json:
            emit({"ok": not faulty, "files": [_verdict(verdict) for verdict in verdicts]})
        else:
            for verdict in faulty:
                for fault in verdict.faults:
                    where = f"(at byte {fault.offset})"
                    say(f"{printable(verdict.path)}: {fault.reason}: {printable(fault.message)} {where}")
            say(f"{len(verdicts)} files, {len(faulty)} with a fault")
    if faulty:
        sys.exit(IntegrityError.exit_code)


def _verdict(verdict: model.Verdict) -> dict[str, Any]:
    faults = [{"code": f.reason, "offset": f.offset, "message": f.message} for f in verdict.faults]
    return {"path": verdict.path, "ok": verdict.ok, "faults": faults}


def doctor(
    path: Annotated[str, typer.Argument(help="Where the models lie.")] = "/",
    as_json: Json = False,
) -> None:
    """Say what works on this machine, what does not and why, and what mends it. Exits 3 when no mount can be served.

    Example: weightfs doctor /srv/models
    """
    with reporting(as_json=as_json):
        if not os.path.exists(path):
            raise WeightfsError("does not exist", path=path)
        from weightfs.cli import snapshot_checks, staging_checks
        from weightfs.doctor import examine

        checks = [*examine(path, start, end), *staging_checks.checks(), *snapshot_checks.checks()]
        can_serve = not any(check.needed and check.state == "missing" for check in checks)
        if as_json:
            rows = [{"name": c.name, "state": c.state, "detail": c.detail, "mend": c.mend} for c in checks]
            emit({"ok": can_serve, "checks": rows})
        else:
            for check in checks:
                mend = f"\n{'':26}mend: {check.mend}" if check.mend else ""
                say(f"{check.state:9} {check.name:15} {check.detail}{mend}")
    if not can_serve:
        sys.exit(UnfitError.exit_code)
