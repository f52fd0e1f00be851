"""`weightfs record`: a real loader on a real mount, and what is learned of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from prefetch.orders import read_order
from prefetch.plan import Extent, Plan, plan_of
from tests.helpers.models import Tensor, tensor, write, write_safetensors
from tests.helpers.mounting import Mounter, mounts_below, weightfs
from weightfs.config import default_state_dir
from weightfs.model import open_model

MIB = 1 << 20
READS_BACKWARDS = """
import os, sys
from safetensors import safe_open
with safe_open(os.path.join(sys.argv[1], "model.safetensors"), "numpy") as file:
    for name in ("model.layers.2.w", "model.layers.1.w", "model.layers.0.w", "model.embed_tokens.weight"):
        assert file.get_tensor(name).any()
print("loaded", sys.argv[1])
"""


def tensors() -> dict[str, Tensor]:
    names = ["model.embed_tokens.weight", *(f"model.layers.{number}.w" for number in range(4))]
    return {name: tensor("U8", (4 * MIB,), seed) for seed, name in enumerate(names)}


@pytest.fixture
def source(tmp_path: Path) -> str:
    root = f"{tmp_path}/source"
    write_safetensors(f"{root}/llama/model.safetensors", tensors())
    write(f"{root}/llama/config.json", b"{}")
    return root


def plan(source: str, learned: list[Extent] | None) -> Plan:
    layout = open_model(f"{source}/llama")
    return plan_of(layout, {"model.safetensors": os.path.getsize(f"{source}/llama/model.safetensors")}, learned)


def order_of(steps: list[dict[str, Any]]) -> list[str]:
    """Without the pages that a layer shares with its neighbour, which come with whichever is read first."""
    return [step["layer"] for step in steps if step["bytes"] > 4096 or step["layer"] == "header"]


def test_the_order_of_a_loader_is_learned_and_shown(source: str, mounter: Mounter) -> None:
    mount = mounter(source)
    asked = mount.path("llama")
    assert order_of(json.loads(weightfs("ls", asked, "--order", "--json").stdout)["order"])[1] == "embedding"
    done = weightfs("record", asked, "--", sys.executable, "-c", READS_BACKWARDS, asked)
    assert done.returncode == 0, done.stderr
    said, shown = done.stdout.split()
    assert said == "loaded"
    assert shown != asked
    assert not os.path.exists(shown)
    assert "order of safetensors kept" in done.stderr

    learned = read_order(mount.state_dir, "llama", ["model.safetensors"], "safetensors")
    assert learned is not None
    order = order_of([{"layer": step.label, "bytes": step.nbytes} for step in plan(source, learned).steps()])
    assert order == ["header", "2", "1", "0", "embedding", "3"]
    for place in (asked, f"{source}/llama"):
        assert order_of(json.loads(weightfs("ls", place, "--order", "--json").stdout)["order"]) == order


def test_a_source_that_nobody_mounted(source: str) -> None:
    done = weightfs("record", f"{source}/llama", "--source", source, "--loader", "mine", "--json", "--",
                    sys.executable, "-c", READS_BACKWARDS, "{}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (order,) = document["orders"]
    try:
        assert (document["model"], document["loader"], document["status"]) == ("llama", "mine", 0)
        assert order["bytes"] < 17 * MIB + 4096
        assert order["reads"] >= 16
        assert os.path.dirname(order["kept"]) == os.path.join(default_state_dir(source), "orders")
        assert read_order(default_state_dir(source), "llama", family="mine")
    finally:
        os.unlink(order["kept"])
        os.removedirs(os.path.dirname(order["kept"]))
    assert "loaded" in done.stderr


def test_a_model_of_links_as_the_hub_keeps_it(tmp_path: Path, mounter: Mounter) -> None:
    root = f"{tmp_path}/hub/models--a--b"
    write_safetensors(f"{root}/blobs/abcdef", tensors())
    os.makedirs(f"{root}/snapshots/1234")
    os.symlink("../../blobs/abcdef", f"{root}/snapshots/1234/model.safetensors")
    mount = mounter(f"{tmp_path}/hub")
    asked = mount.path("models--a--b/snapshots/1234")
    done = weightfs("record", asked, "--", sys.executable, "-c", READS_BACKWARDS, asked)
    assert done.returncode == 0, done.stderr
    learned = read_order(mount.state_dir, "models--a--b/snapshots/1234")
    assert learned is not None
    assert {one.file for one in learned} == {"model.safetensors"}


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["sh", "-c", "exit 7", "{}"], 7, "ended with 7"),
        (["sh", "-c", "kill -TERM $$", "{}"], 143, "ended with 143"),
        (["/nowhere/loader", "{}"], 127, "No such file"),
        (["true", "{}"], 0, "read no weights"),
        (["true"], 2, "does not name the model"),
    ],
)
def test_a_command_that_teaches_nothing(
    tmp_path: Path, source: str, mounter: Mounter, monkeypatch: pytest.MonkeyPatch,
    command: list[str], status: int, said: str,
) -> None:  # fmt: skip
    mount = mounter(source)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/scratch")
    done = weightfs("record", mount.path("llama"), "--", *command)
    assert done.returncode == status
    assert said in done.stderr
    assert read_order(mount.state_dir, "llama") is None
    assert not mounts_below(f"{tmp_path}/scratch")
    assert not os.listdir(f"{tmp_path}/scratch")


def test_a_model_of_no_source_is_refused(source: str) -> None:
    done = weightfs("record", f"{source}/llama", "--", "true", "{}")
    assert done.returncode == 1
    assert "name its --source" in done.stderr
