"""Prefetch on real mounts: what begins it, what it reads, what it leaves alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefetch.orders import write_order
from prefetch.plan import Extent
from prefetch.residency import drop, resident_bytes
from tests.helpers.models import (
    every_quantisation,
    model_tensors,
    write,
    write_gguf,
    write_hub_cache,
    write_safetensors,
    write_sharded,
)
from tests.helpers.mounting import Mount, Mounter, both_engines, child, wait_until, wait_until_settled, weightfs

ROWS = 2048
SHOWS_S = 30.0


def files_below(folder: str) -> list[str]:
    return [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]


def make_cold(folder: str) -> None:
    for path in files_below(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        drop(fd)
        assert resident_bytes(fd, 0, os.fstat(fd).st_size) == 0, path
        os.close(fd)


def resident(path: str) -> float:
    """The part of a file that is in memory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        return resident_bytes(fd, 0, size) / size
    finally:
        os.close(fd)


WHOLE = 0.98
"""On a virtual machine pages vanish without any reclaim: two of 64 MiB within 16 s with nothing of ours running."""
COLD = 0.1
"""Indexing reads headers while a test runs, and read-ahead a little more."""


def weights_of(folder: str) -> list[str]:
    return [path for path in files_below(folder) if path.endswith((".safetensors", ".gguf"))]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A source with one sharded model in the folder `llama`; gives the source."""
    folder = tmp_path / "source" / "llama"
    write_sharded(str(folder), model_tensors(4, rows=ROWS), 2)
    write(str(folder / "config.json"), b"{}")
    write(str(folder / "tokenizer.json"), b"{}")
    write(str(folder / "README.md"), b"a model")
    return str(tmp_path / "source")


def use(mount: Mount, *names: str) -> None:
    """Open and read a file, as a program that is no copier does."""
    with open(mount.path(*names), "rb") as file:
        file.read(1)


def wait_until_resident(paths: list[str]) -> None:
    wait_until(lambda: all(resident(path) >= WHOLE for path in paths), "all of it is in memory", timeout_s=SHOWS_S)


def quiet(mount: Mount) -> dict[str, Any]:
    """The state of prefetch once it does nothing."""

    def look() -> dict[str, Any] | None:
        state: dict[str, Any] = mount.live()["prefetch"]
        return state if not state["active"] else None

    state = wait_until(look, "prefetch ends")
    assert state is not None
    return state


@both_engines
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_opening_a_small_file_reads_all_shards(model: str, mounter: Mounter, engine: str, name: str) -> None:
    mount = mounter(model, engine)
    make_cold(model)
    use(mount, "llama", name)
    wait_until_resident(weights_of(model))


@both_engines
def test_opening_one_shard_reads_its_siblings(model: str, mounter: Mounter, engine: str) -> None:
    mount = mounter(model, engine)
    make_cold(model)
    use(mount, "llama", "model-00002-of-00002.safetensors")
    wait_until_resident(weights_of(model))


def test_other_files_begin_nothing(model: str, mounter: Mounter) -> None:
    mount = mounter(model)
    make_cold(model)
    use(mount, "llama", "README.md")
    assert quiet(mount)["triggers"] == 0
    assert all(resident(path) <= COLD for path in weights_of(model))


def test_off_reads_only_on_request(model: str, mounter: Mounter) -> None:
    mount = mounter(model, "auto", "--prefetch", "off")
    make_cold(model)
    use(mount, "llama", "config.json")
    assert quiet(mount)["wanted"] == 0
    assert all(resident(path) <= COLD for path in weights_of(model))
    assert weightfs("warm", mount.path("llama")).returncode == 0
    assert all(resident(path) >= WHOLE for path in weights_of(model))


def test_names_of_a_hub_cache_are_links(tmp_path: Path, mounter: Mounter) -> None:
    source = str(tmp_path / "source")
    snapshot = os.path.relpath(write_hub_cache(source, model_tensors(2, rows=ROWS)), source)
    mount = mounter(source)
    make_cold(source)
    use(mount, snapshot, "config.json")
    wait_until_resident([os.path.realpath(os.path.join(source, snapshot, "model.safetensors"))])


def test_a_quantisation_is_read_when_it_is_opened_and_its_neighbours_are_not(tmp_path: Path, mounter: Mounter) -> None:
    source = str(tmp_path / "source")
    for name in ("a-q4.gguf", "a-q8.gguf"):
        write_gguf(write(os.path.join(source, name), b""), every_quantisation(2048))
    write(os.path.join(source, "config.json"), b"{}")
    mount = mounter(source)
    make_cold(source)
    use(mount, "config.json")
    assert quiet(mount)["wanted"] == 0, "nothing says which of them is meant"
    use(mount, "a-q8.gguf")
    wait_until_resident([os.path.join(source, "a-q8.gguf")])
    assert resident(os.path.join(source, "a-q4.gguf")) < 0.5, "but for its header, which indexing may have read"


def test_a_draft_is_read_with_its_model(tmp_path: Path, mounter: Mounter) -> None:
    source = str(tmp_path / "source")
    for name in ("big", "small"):
        write_safetensors(os.path.join(source, name, "model.safetensors"), model_tensors(2, rows=ROWS))
        write(os.path.join(source, name, "config.json"), b"{}")
    config = write(str(tmp_path / "weightfs.toml"), b'[draft]\nbig = "small"\n')
    mount = mounter(source, "auto", "--config", config)
    make_cold(source)
    use(mount, "big", "config.json")
    wait_until_resident(weights_of(source))
    assert [one["model"] for one in json.loads(weightfs("warm", mount.path("big"), "--json").stdout)["models"]] == [
        "small/model",
        "big/model",
    ]


def test_warm_residency_and_evict_agree(model: str, mounter: Mounter) -> None:
    mount = mounter(model)
    wait_until_settled(*weights_of(model))
    make_cold(model)
    cold = json.loads(weightfs("residency", mount.path("llama"), "--json").stdout)
    assert cold["resident_bytes"] <= COLD * cold["bytes"]
    assert cold["bytes"] == sum(layer["bytes"] for layer in cold["layers"])
    assert cold["bytes"] == sum(os.path.getsize(path) for path in weights_of(model))
    done = weightfs("warm", mount.path("llama"), "--json")
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout)["models"]
    assert (said["failure"], said["active"]) == (None, False)
    assert said["filled_bytes"] + said["found_bytes"] == cold["bytes"], "read-ahead brings some of it before its turn"
    assert said["filled_bytes"] > 0
    again = json.loads(weightfs("warm", mount.path("llama"), "--json").stdout)["models"][0]
    assert again["found_bytes"] >= 0.5 * cold["bytes"], "what is in memory is not read again"
    warm = json.loads(weightfs("residency", mount.path("llama"), "--json").stdout)
    assert warm["resident_bytes"] >= WHOLE * warm["bytes"]
    assert weightfs("evict", mount.path("llama")).returncode == 0
    assert all(resident(path) <= COLD for path in weights_of(model))


def test_ls_shows_the_order(model: str, mounter: Mounter) -> None:
    mount = mounter(model)
    said = json.loads(weightfs("ls", "--order", mount.path("llama"), "--json").stdout)
    assert [step["layer"] for step in said["order"]] == ["header", "embedding", "0", "1", "2", "3", "norm", "head"]
    assert sum(step["bytes"] for step in said["order"]) == sum(os.path.getsize(path) for path in weights_of(model))
    assert "read in this order" in weightfs("ls", "--order", os.path.join(model, "llama")).stdout


def test_a_learned_order_is_followed(tmp_path: Path, mounter: Mounter) -> None:
    source, state = str(tmp_path / "source"), str(tmp_path / "state")
    path = write_safetensors(os.path.join(source, "a", "model.safetensors"), model_tensors(4, rows=ROWS))
    last = os.path.getsize(path) // 4096 * 4096
    write_order(state, "a", "test", [Extent("model.safetensors", last - 4096, 4096)])
    mount = mounter(source, state_dir=state)
    said = json.loads(weightfs("ls", "--order", mount.path("a"), "--json").stdout)["order"]
    assert said[0]["extents"][0]["offset"] == last - 4096
    make_cold(source)
    assert warm(mount, "a")["failure"] is None
    assert resident(path) >= WHOLE


def test_a_path_on_no_mount_is_said_to_be(model: str) -> None:
    for command in ("warm", "evict", "residency"):
        done = weightfs(command, model)
        assert done.returncode == 1
        assert "lies on no weightfs mount" in done.stderr


def test_ten_thousand_triggers_are_one_plan(model: str, mounter: Mounter) -> None:
    mount = mounter(model)
    make_cold(model)

    def trigger() -> None:
        for _ in range(2500):
            use(mount, "llama", "config.json")

    threads = [threading.Thread(target=trigger) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = quiet(mount)
    assert state["triggers"] == 10000
    size = sum(os.path.getsize(path) for path in weights_of(model))
    assert state["coalesced"] >= 9000
    assert 0 < state["filled_bytes"] <= 5 * size, "a plan a second at most"
    assert {load["outcome"] for load in mount.control("timeline")["loads"]} == {"complete"}
    wait_until_resident(weights_of(model))


def test_a_backup_begins_nothing(tmp_path: Path, mounter: Mounter) -> None:
    source = str(tmp_path / "source")
    for number in range(8):
        write_safetensors(os.path.join(source, f"m{number}", "model.safetensors"), model_tensors(1))
        write(os.path.join(source, f"m{number}", "config.json"), b"{}")
    mount = mounter(source)
    copied = subprocess.run(["tar", "-C", mount.mountpoint, "-cf", str(tmp_path / "all.tar"), "."], check=False)
    assert copied.returncode == 0
    assert quiet(mount)["wanted"] == 0
    for number in range(8):  # one process, no known copier
        use(mount, f"m{number}", "config.json")
    state = quiet(mount)
    assert state["wanted"] <= 3
    assert state["walks"] >= 5


@pytest.mark.parametrize("harm", ["shrinks", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_read(model: str, mounter: Mounter, harm: str) -> None:
    mount = mounter(model)
    victim = os.path.join(model, "llama", "model-00002-of-00002.safetensors")
    harms: dict[str, Callable[[], object]] = {
        "shrinks": lambda: os.truncate(victim, 4096),
        "replaced": lambda: os.replace(shutil.copy(victim, victim + ".new"), victim),
        "removed": lambda: os.unlink(victim),
    }
    for _ in range(5):
        make_cold(model)
        assert weightfs("warm", "--no-wait", mount.path("llama")).returncode == 0
        if os.path.exists(victim) and os.path.getsize(victim) > 4096:
            harms[harm]()
        quiet(mount)
    use(mount, "llama", "model-00001-of-00002.safetensors")
    assert os.listdir(mount.path("llama"))


def test_a_daemon_killed_while_it_reads_is_followed_by_one_that_reads(model: str, mounter: Mounter) -> None:
    mount = mounter(model)
    make_cold(model)
    assert weightfs("warm", "--no-wait", mount.path("llama")).returncode == 0
    mount.kill_daemon()
    wait_until(lambda: weightfs("warm", mount.path("llama")).returncode == 0, "a successor reads")
    wait_until_resident(weights_of(model))


def held(pid: int) -> int:
    """How many descriptors a process has, but for the sinks of the filler's threads, some of which begin late."""
    places = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            places.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return len([place for place in places if place != os.devnull])


def test_descriptors_are_given_back(model: str, mounter: Mounter) -> None:
    mount = mounter(model)
    use(mount, "llama", "config.json")
    quiet(mount)
    pid = mount.daemon_pid()
    before = held(pid)
    for _ in range(5):
        make_cold(model)
        assert weightfs("warm", mount.path("llama")).returncode == 0
    wait_until(lambda: held(pid) <= before, "descriptors come back")


def test_the_timeline_tells_of_each_load(model: str, mounter: Mounter, tmp_path: Path) -> None:
    mount = mounter(model)
    make_cold(model)
    assert weightfs("warm", mount.path("llama")).returncode == 0
    page = tmp_path / "loads.html"
    done = weightfs("timeline", mount.mountpoint, "--json", "--html", str(page))
    assert done.returncode == 0, done.stderr
    (load,) = json.loads(done.stdout)["loads"]
    assert (load["model"], load["trigger"], load["outcome"]) == ("llama/model", "warm", "complete")
    assert [layer["label"] for layer in load["layers"]][:3] == ["header", "embedding", "0"]
    last = dict(pair for sample in load["samples"] for pair in sample["changed"])
    assert last == {number: layer["bytes"] for number, layer in enumerate(load["layers"])}
    assert 0 <= load["submitted_s"] < 10
    assert "llama/model" in page.read_text()


@pytest.fixture
def three(tmp_path: Path) -> str:
    """A source with three models of the same size; gives the source."""
    source = str(tmp_path / "source")
    for name in ("a", "b", "c"):
        write_safetensors(os.path.join(source, name, "model.safetensors"), model_tensors(4, rows=ROWS))
    return source


def budget_for(source: str, models: float) -> str:
    return str(int(os.path.getsize(os.path.join(source, "a", "model.safetensors")) * models))


def warm(mount: Mount, name: str) -> dict[str, Any]:
    return dict(json.loads(weightfs("warm", mount.path(name), "--json").stdout)["models"][0])


def test_what_was_wanted_longest_ago_leaves_for_what_comes(three: str, mounter: Mounter) -> None:
    mount = mounter(three, "auto", "--memory-budget", budget_for(three, 2.5))
    make_cold(three)
    for name in ("a", "b", "c"):
        assert warm(mount, name)["failure"] is None
    left = [resident(os.path.join(three, name, "model.safetensors")) for name in ("a", "b", "c")]
    assert left[0] <= COLD
    assert min(left[1:]) >= WHOLE
    assert mount.live()["prefetch"]["evicted_bytes"] >= 0.9 * int(budget_for(three, 1))


@both_engines
@pytest.mark.parametrize("kept_open", [True, False])
def test_what_a_process_has_mapped_stays(three: str, mounter: Mounter, engine: str, kept_open: bool) -> None:
    mount = mounter(three, engine, "--memory-budget", budget_for(three, 1.5))
    make_cold(three)
    code = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
mapping = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
if sys.argv[2] == "False":
    os.close(fd)
print("mapped", flush=True)
sys.stdin.read()
"""
    assert warm(mount, "a")["failure"] is None
    with child(code, mount.path("a", "model.safetensors"), str(kept_open)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        quiet(mount)
        said = warm(mount, "b")
        assert "has room for" in said["failure"]
        assert resident(os.path.join(three, "a", "model.safetensors")) >= WHOLE
    assert warm(mount, "c")["failure"] is None
    assert resident(os.path.join(three, "a", "model.safetensors")) < 0.05, "but for its header, which was read again"


def test_a_budget_lets_the_first_layers_in(three: str, mounter: Mounter) -> None:
    mount = mounter(three, "auto", "--memory-budget", budget_for(three, 0.5))
    make_cold(three)
    said = warm(mount, "a")
    assert "has room for" in said["failure"]
    assert 0 < said["filled_bytes"] + said["found_bytes"] <= int(budget_for(three, 0.5)), "read-ahead may add to it"
    layers = json.loads(weightfs("residency", mount.path("a"), "--json").stdout)["layers"]
    parts = {layer["layer"]: layer["resident_bytes"] / layer["bytes"] for layer in layers}
    assert parts["embedding"] >= WHOLE


def test_pinned_layers_stay_when_the_model_is_dropped(three: str, mounter: Mounter) -> None:
    mount = mounter(three, "auto", "--pin-layers", "embedding,0-1")
    make_cold(three)
    assert warm(mount, "a")["failure"] is None
    path = os.path.join(three, "a", "model.safetensors")
    fd = os.open(path, os.O_RDONLY)
    drop(fd)
    os.close(fd)
    layers = json.loads(weightfs("residency", mount.path("a"), "--json").stdout)["layers"]
    parts = {layer["layer"]: layer["resident_bytes"] / layer["bytes"] for layer in layers}
    assert min(parts["embedding"], parts["0"], parts["1"]) == 1
    assert parts["3"] < WHOLE
    assert mount.live()["prefetch"]["locked_bytes"] > 0


@pytest.mark.parametrize("options", [("--memory-budget", "lots"), ("--pin-layers", "3-0"), ("--prefetch", "some")])
def test_settings_that_say_nothing_are_refused(three: str, tmp_path: Path, options: tuple[str, str]) -> None:
    place = tmp_path / "place"
    place.mkdir()
    done = weightfs("mount", three, str(place), "--state-dir", str(tmp_path / "state"), *options)
    assert done.returncode == 2
    assert options[1] in done.stderr
