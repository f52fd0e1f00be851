"""`ls`, `verify`, `doctor`: look without mounting."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prefetch.plan import Extent, Layer, plan_of
from weightfs import model
from weightfs.cli.mounting import Json, end, start
from weightfs.cli.output import emit, human_bytes, printable, reporting, say
from weightfs.errors import IntegrityError, UnfitError, WeightfsError
from weightfs.formats.layout import TensorExtent, WeightLayout

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN_EXTENTS: Final = 4


def ls(
    path: Annotated[str, typer.Argument(help="A weight file, or a folder that holds some.")],
    order: Annotated[bool, typer.Option("--order", help="Show what is read ahead, in which order.")] = False,
    as_json: Json = False,
) -> None:
    """List the tensors of a weight file or model folder, mounted or not.

    Example: weightfs ls /models/llama --order
    """
    with reporting(as_json=as_json):
        if os.path.isdir(path):
            folder, layouts = path, model.folder_layouts(path)
            if not layouts:
                raise WeightfsError("holds no weight files", path=path)
        else:
            folder, layouts = os.path.dirname(path), {os.path.basename(path): model.file_layout(path)}
        steps = {name: _steps(folder, layout) for name, layout in layouts.items()} if order else {}
        if as_json:
            document: dict[str, Any] = {
                "tensors": [_row(tensor) for layout in layouts.values() for tensor in layout.tensors]
            }
            if order:
                document["order"] = [_step(step) for of_one in steps.values() for step in of_one]
            emit(document)
            return
        for name, layout in layouts.items():
            if order:
                _print_order(name, steps[name])
            else:
                _print_layout(name, layout)


def _steps(folder: str, layout: WeightLayout) -> tuple[Layer, ...]:
    return plan_of(layout, _sizes(folder, layout)).steps()


def _sizes(folder: str, layout: WeightLayout) -> Mapping[str, int]:
    try:
        return {file: os.stat(os.path.join(folder, file)).st_size for file in layout.files}
    except OSError as e:
        raise WeightfsError(f"can't be examined: {os.strerror(e.errno or 0)}", path=e.filename) from e


def _step(step: Layer) -> dict[str, Any]:
    extents = [{"file": one.file, "offset": one.offset, "nbytes": one.nbytes} for one in step.extents]
    return {"layer": step.label, "bytes": step.nbytes, "extents": extents}


def _print_order(name: str, steps: tuple[Layer, ...]) -> None:
    table = _table(("order", True), ("layer", False), ("bytes", True), ("read from", False))
    for number, step in enumerate(steps, 1):
        where = [_place(extent) for extent in step.extents[:_SHOWN_EXTENTS]]
        if (more := len(step.extents) - _SHOWN_EXTENTS) > 0:
            where.append(f"and {more} more")
        _add(table, f"{number}", step.label, f"{step.nbytes:,}", ", ".join(where))
    _print(table)
    total = sum(step.nbytes for step in steps)
    reads = sum(len(step.extents) for step in steps)
    say(f"{printable(name)}: {human_bytes(total)} in {len(steps)} steps, {reads} extents")


def _place(extent: Extent) -> str:
    return f"{extent.file} {extent.offset:,} to {extent.end:,}"


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
    table = _table(("tensor", False), ("dtype", False), ("shape", False), ("bytes", True), ("layer", True),
                   ("file", False), ("offset", True))  # fmt: skip
    for tensor in layout.tensors:
        place = str(tensor.layer) if tensor.layer is not None else tensor.role.value
        _add(
            table, tensor.name, tensor.dtype, "x".join(map(str, tensor.shape)) or "scalar",
            f"{tensor.nbytes:,}", place, tensor.file, f"{tensor.offset:,}",
        )  # fmt: skip
    _print(table)
    count, files = len(layout.tensors), len(layout.files)
    say(f"{printable(name)}: {count} tensors, {human_bytes(layout.nbytes)} in {files} file{'s' * (files != 1)}")


def _table(*columns: tuple[str, bool]) -> Table:
    """An empty table: headings, and whether what is below one is a number."""
    # Here, as in `doctor`: each command loads this module, and `mount` is not to wait for what it does not use.
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, is_number in columns:
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    from rich.text import Text

    # Text, not markup; and names are a stranger's bytes, which must not steer the terminal.
    table.add_row(*(Text(printable(cell)) for cell in cells))


def _print(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


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
        from weightfs.doctor import examine

        checks = examine(path, start, end)
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
