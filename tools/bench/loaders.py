"""Page cache to GPU, and disk to GPU: weightfs.torch and its peers, one after the other, in alternating rounds.

    tools/gpu/run tools/bench/loaders.py --json FILE               on the GPU machine: 7.2 GB in 3 shards, below 120 s
    python tools/bench/loaders.py --device cpu --gigabytes 0.05    a trial anywhere

Every loader is a process of its own that has imported all it needs and has a GPU's context; it loads the whole model,
gives all memory of the device back, and waits for its next turn. The order is turned by one each round. A first load is
not counted in the medians and stands beside them: what a loader prepares once (pinned memory) is in it. Every tensor of
every counted load is compared with the files by a digest of all its bytes, made on the device.

Rows come from a mount of weightfs, as users have it, and those of weightfs.torch from the bare folder as well. `warm`
is from the page cache; `cold` has nothing of the files in memory before. The ceiling is how fast one pinned buffer is
copied to the GPU, in each round; that of the disk, reads past the page cache by 12 threads. On a CPU safetensors and
weightfs.torch map the file: what is measured there is no copy.

A loader that is not installed is said to be, and one that fails says why; `--seconds` bounds the run, rounds are
dropped and said to be. The table says what was claimed by nobody: peers run with their defaults (no GPUDirect).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from _loader_child import LOADERS, files_of

HERE: Final = os.path.dirname(os.path.abspath(__file__))
COMMAND: Final = [sys.executable, "-c", "from weightfs.cli.main import main; main()"]
NEEDS: Final = {
    "weightfs.torch load_model": "transformers",
    "weightfs.torch accelerate": "transformers",
    "safetensors": "safetensors",
    "transformers": "transformers",
    "runai-model-streamer": "runai_model_streamer",
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "instanttensor",
}
OURS: Final = "weightfs.torch"
START_S: Final = 90.0
LOAD_S: Final = 60.0
DISK_THREADS: Final = 12
DISK_READ_BYTES: Final = 16 << 20
GOAL_GB_S: Final = 44.0
GOAL_OF_CEILING: Final = 0.82


@dataclass
class Row:
    """One loader from one place, warm or cold.

    Attributes:
        first_gb_s: of the first load in its process; None for cold rows, which come later.
        samples: GB/s of each counted load.
        same_bytes: whether all tensors of all counted loads were those of the files.
        peak_device_bytes: the most that torch had allocated.
        failed: why there are no figures.
    """

    loader: str
    place: str
    state: str
    first_gb_s: float | None = None
    samples: list[float] = field(default_factory=list)
    same_bytes: bool | None = None
    peak_device_bytes: int | None = None
    failed: str | None = None

    @property
    def median_gb_s(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None


class Child:
    """A loader's process."""

    def __init__(self, name: str, device: str) -> None:
        self.device = device
        self._process = subprocess.Popen(
            [sys.executable, os.path.join(HERE, "_loader_child.py"), name, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors: list[str] = []
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors = [*self._errors[-9:], line.strip()]

    def ready(self) -> None:
        self._answer(START_S)

    def ask(self, *request: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"failed": f"ended: {' | '.join(self._errors[-3:])}"}
        return self._answer(LOAD_S)

    def _answer(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        alarm = threading.Timer(seconds, self._process.kill)
        alarm.start()
        try:
            line = self._process.stdout.readline()
        finally:
            alarm.cancel()
        return json.loads(line) if line else {"failed": f"ended: {' | '.join(self._errors[-3:])}"}

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


# Files


def make_model(folder: str, gigabytes: float, device: str) -> None:
    script = os.path.join(HERE, "_random_llama.py")
    subprocess.run([sys.executable, script, folder, str(gigabytes), device], check=True, stdout=sys.stderr)


def warm(paths: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_read_all, paths))


def _read_all(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(16 << 20):
            pass


def evict(paths: list[str]) -> None:
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_gb_s(paths: list[str]) -> float | None:
    """Reads past the page cache, by threads; None where the filesystem refuses that."""
    parts = [(path, at) for path in paths for at in range(0, os.path.getsize(path) // 4096 * 4096, DISK_READ_BYTES)]

    def read(part: tuple[str, int]) -> int:
        fd = os.open(part[0], os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, DISK_READ_BYTES) as buffer:
                return os.preadv(fd, [buffer], part[1])
        finally:
            os.close(fd)

    started = time.perf_counter()
    try:
        with ThreadPoolExecutor(DISK_THREADS) as pool:
            nbytes = sum(pool.map(read, parts))
    except OSError:
        return None
    return nbytes / (time.perf_counter() - started) / 1e9


@contextlib.contextmanager
def mounted(source: str, place: str) -> Iterator[str]:
    point = os.path.join(place, "mount")
    os.mkdir(point)
    time.sleep(2.2)  # younger files are not recorded
    options = ["--state-dir", os.path.join(place, "state"), "--json"]
    done = subprocess.run([*COMMAND, "mount", source, point, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"mount: {done.stdout}{done.stderr}")
    try:
        yield point
    finally:
        subprocess.run([*COMMAND, "umount", point], check=False, stdout=subprocess.DEVNULL)


# Rounds


def measure(options: argparse.Namespace, folders: dict[str, str], ends: float) -> dict[str, Any]:
    wanted = [name for name in LOADERS if not options.only or name in options.only]
    absent = [name for name in wanted if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    names = [name for name in wanted if name not in absent]
    children = {name: Child(name, options.device) for name in (*names, "reference")}
    try:
        for child in children.values():
            child.ready()
        reference = children.pop("reference")
        files = files_of(folders["bare"])
        nbytes = sum(os.path.getsize(path) for path in files)
        warm(files)
        digests = reference.ask("digest", folders["bare"])
        turns = [(name, place) for place in folders for name in names if place == "mount" or name.startswith(OURS)]
        turns = turns if "mount" in folders else [(name, "bare") for name in names]
        rows = {(*turn, state): Row(*turn, state) for state in ("warm", "cold") for turn in turns}
        found: dict[str, Any] = {"nbytes": nbytes, "not installed": absent, "dropped": [], "ceiling": [], "disk": []}

        for turn in turns:
            first(rows[*turn, "warm"], children[turn[0]], folders[turn[1]], nbytes)
        for state, rounds in (("warm", options.rounds), ("cold", options.cold_rounds)):
            for number in range(rounds):
                if time.monotonic() > ends:
                    found["dropped"].append(f"{state} round {number + 1}")
                    continue
                if state == "warm":
                    found["ceiling"].append(reference.ask("ceiling", nbytes))
                else:
                    evict(files)
                    found["disk"].append(disk_gb_s(files))
                at = number % len(turns)
                for turn in turns[at:] + turns[:at]:
                    if state == "cold" and time.monotonic() > ends:
                        found["dropped"].append(f"cold {turn[0]} from {turn[1]}")
                        continue
                    (warm if state == "warm" else evict)(files)
                    counted(rows[*turn, state], children[turn[0]], folders[turn[1]], nbytes, digests)
        return found | {"rows": [one for one in rows.values() if one.samples or one.failed]}
    finally:
        for child in children.values():
            child.end()
        if "reference" not in children:
            reference.end()


def first(row: Row, child: Child, folder: str, nbytes: int) -> None:
    said = child.ask("load", folder, False)
    if "failed" in said:
        row.failed = said["failed"]
    else:
        row.first_gb_s = nbytes / said["seconds"] / 1e9


def counted(row: Row, child: Child, folder: str, nbytes: int, digests: dict[str, str]) -> None:
    if row.failed:
        return
    said = child.ask("load", folder, True)
    if "failed" not in said and said["on"] != [child.device]:
        said["failed"] = f"left tensors on {said['on']}"
    if "failed" in said:
        row.failed = said["failed"]
        return
    row.samples.append(nbytes / said["seconds"] / 1e9)
    row.same_bytes = row.same_bytes is not False and said["digests"] == digests
    row.peak_device_bytes = max(row.peak_device_bytes or 0, said["peak_device_bytes"] or 0) or None


# Table


def show(found: dict[str, Any], device: str) -> dict[str, bool | None]:
    ceiling = statistics.median(found["ceiling"]) if device == "cuda" and found["ceiling"] else None
    disks = [one for one in found["disk"] if one]
    disk = statistics.median(disks) if disks else None
    print(f"{found['nbytes'] / 1e9:.2f} GB; pinned ceiling {say(ceiling)} GB/s; disk {say(disk)} GB/s")
    print(f"{'loader':28}{'from':7}{'state':6}{'first':>8}{'median':>8}{'min':>8}{'max':>8}{'share':>7}  bytes")
    for row in found["rows"]:
        limit = ceiling if row.state == "warm" else disk
        share = row.median_gb_s / limit if row.median_gb_s and limit else None
        line = f"{row.loader:28}{row.place:7}{row.state:6}"
        if row.failed:
            print(f"{line}  failed: {row.failed[:150]}")
            continue
        line += f"{say(row.first_gb_s):>8}{say(row.median_gb_s):>8}{say(min(row.samples)):>8}{say(max(row.samples)):>8}"
        print(f"{line}{say(share, 2):>7}  {'same' if row.same_bytes else 'DIFFERENT'}")
    for name in found["not installed"]:
        print(f"{name:28}not installed here")
    for what in found["dropped"]:
        print(f"dropped for time: {what}")
    goals = judge(found["rows"], ceiling)
    for goal, met in goals.items():
        print(f"{goal}: {'-' if met is None else 'yes' if met else 'no'}")
    return goals


def judge(rows: list[Row], ceiling: float | None) -> dict[str, bool | None]:
    place = "mount" if any(row.place == "mount" for row in rows) else "bare"
    medians = {row.loader: row.median_gb_s for row in rows if (row.place, row.state) == (place, "warm") and row.samples}
    ours = medians.get(f"{OURS} load_files")
    peers = [speed for name, speed in medians.items() if not name.startswith(OURS) and speed]
    return {
        f"{GOAL_GB_S:g} GB/s, warm, from the {place}": None if ceiling is None or not ours else ours >= GOAL_GB_S,
        f"{GOAL_OF_CEILING} of the ceiling": None if ceiling is None or not ours else ours / ceiling >= GOAL_OF_CEILING,
        "ahead of every peer": ours > max(peers) if ours and peers else None,
        "all bytes the same": all(row.same_bytes for row in rows if row.samples),
    }


def say(number: float | None, digits: int = 1) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


def version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def main() -> None:
    begun = time.monotonic()
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gigabytes", type=float, default=7.2)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--rounds", type=int, default=3, help="counted warm rounds (default 3)")
    options.add_argument("--cold-rounds", type=int, default=1, help="rounds with nothing in memory (default 1)")
    options.add_argument("--seconds", type=float, default=105, help="no round begins after that (default 105)")
    options.add_argument("--only", action="append", metavar="LOADER", help="may be repeated")
    options.add_argument("--model", default=None, metavar="FOLDER", help="made there if it is not there yet; kept")
    options.add_argument("--bare", action="store_true", help="no mount")
    options.add_argument("--json", default=None, metavar="FILE")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="weightfs-loaders-") as place, contextlib.ExitStack() as stack:
        model = chosen.model or os.path.join(place, "models")
        if not os.path.isdir(model) or not files_of(model):
            os.makedirs(model, exist_ok=True)
            make_model(model, chosen.gigabytes, chosen.device)
        made_s = time.monotonic() - begun
        folders = {"bare": model}
        if not chosen.bare:
            folders["mount"] = stack.enter_context(mounted(model, place))
        found = measure(chosen, folders, begun + chosen.seconds)
    goals = show(found, chosen.device)
    packages = ("torch", "safetensors", "transformers", "runai-model-streamer", "fastsafetensors", "instanttensor")
    document = {
        "machine": {"kernel": platform.release(), "processors": os.cpu_count(), "python": platform.python_version()},
        "gpu": gpu() if chosen.device == "cuda" else None,
        "versions": {name: version(name) for name in packages},
        "arguments": vars(chosen),
        "made_s": made_s,
        "seconds": time.monotonic() - begun,
        **found,
        "rows": [asdict(row) | {"median_gb_s": row.median_gb_s} for row in found["rows"]],
        "goals": goals,
    }
    print(f"{document['seconds']:.0f} s, of which {made_s:.0f} s to make the model")
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)


def gpu() -> str | None:
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None


if __name__ == "__main__":
    main()
