"""`weightfs demo`: a small model, mounted, loaded by programs that know nothing of it, compared, cleaned up."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from weightfs import mounts
from weightfs.cli.mounting import end, start
from weightfs.cli.options import Json
from weightfs.cli.output import emit, human_bytes, reporting, say
from weightfs.config import MountConfig
from weightfs.errors import IntegrityError, UnfitError, WeightfsError


def demo(as_json: Json = False) -> None:
    """Make a small model, mount it, load it with unmodified safetensors and transformers, compare, clean up.

    Example: ./tools/run demo
    """
    with reporting(as_json=as_json):
        missing = [name for name in ("torch", "transformers", "safetensors") if not importlib.util.find_spec(name)]
        if missing:
            raise UnfitError(
                f"the demo needs {', '.join(missing)}", mend="./tools/run demo, or pip install weightfs[demo]"
            )
        with tempfile.TemporaryDirectory(prefix="weightfs-demo-") as folder:
            document = _show(folder, quiet=as_json)
        if as_json:
            emit(document)


def _show(folder: str, *, quiet: bool) -> dict[str, Any]:
    def tell(text: str) -> None:
        if not quiet:
            say(text)
            sys.stdout.flush()

    source, mountpoint = os.path.join(folder, "models"), os.path.join(folder, "mount")
    os.makedirs(os.path.join(source, "demo-llama"))
    os.mkdir(mountpoint)
    tell("making a small random Llama ...")
    _loader("make", os.path.join(source, "demo-llama"))
    mounted = start(MountConfig(source=source, mountpoint=mountpoint, state_dir=os.path.join(folder, "state")))
    tell(f"mounted: {mounted['engine']} engine ({mounted['reason']})")
    try:
        shown = os.path.join(mountpoint, "demo-llama")
        bare = _loader("load", os.path.join(source, "demo-llama"))
        first, before = _reads(mountpoint), _reads(mountpoint)
        through = _loader("load", shown)
        reads = _reads(mountpoint) - before - (before - first)  # asking takes reads, too
        if any(bare[key] != through[key] for key in ("nbytes", "tensors_sha256", "logits_sha256")):
            raise IntegrityError("the mount gave other weights than the folder", path=shown)
        for library in ("safetensors", "transformers"):
            tell(
                f"{library:12} {human_bytes(bare['nbytes'])} from the folder in {bare[library + '_s']:.2f} s, "
                f"from the mount in {through[library + '_s']:.2f} s"
            )
        tell(f"the same bytes and the same outputs; read requests that reached user space meanwhile: {reads}")
        tensors = os.path.join(shown, ".tensors", "model")
        names = sorted(os.listdir(tensors))
        started = time.perf_counter()
        with open(os.path.join(tensors, names[0]), "rb") as tensor:
            size = len(tensor.read())
        tell(
            f"{len(names)} tensors are files too: .tensors/model/{names[0]}, {human_bytes(size)}, "
            f"read in {(time.perf_counter() - started) * 1000:.1f} ms"
        )
        return {"mount": mounted, "bare": bare, "mounted": through, "same": True, "reads": reads, "tensors": len(names)}
    finally:
        with contextlib.suppress(WeightfsError):
            mounts.unmount(mountpoint, lazy=True)
        end(int(mounted["supervisor_pid"]))


def _reads(mountpoint: str) -> int:
    with open(os.path.join(mountpoint, ".weightfs", "status.json"), encoding="utf-8") as file:
        return int(json.load(file)["requests"].get("read", 0))


def _loader(action: str, folder: str) -> dict[str, Any]:
    script = os.path.join(os.path.dirname(__file__), "demo_loader.py")
    done = subprocess.run(
        [sys.executable, script, action, folder],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise WeightfsError(f"the loader failed: {lines[-1]}", path=folder)
    return dict(json.loads(done.stdout)) if done.stdout.strip() else {}
