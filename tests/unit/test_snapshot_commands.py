"""`weightfs snapshot list`, `show`, `verify`, `rm`, `prune`, as cron and people call them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from checkpoint import machine
from checkpoint.chunks.keys import MasterKey
from checkpoint.errors import MisfitError
from checkpoint.store import Store
from tests.helpers.snapshots import FINGERPRINT, add, add_chunked
from weightfs import mounts
from weightfs.cli.main import app

DAY_NS = 86_400 * 10**9


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store on a machine that is as the one its snapshots were made on."""
    monkeypatch.setattr(machine, "fingerprint_here", lambda: msgspec.structs.replace(FINGERPRINT, command=[]))
    monkeypatch.setattr(mounts, "find", lambda mountpoint: mounts.Mounted(mountpoint, "/srv", "0:1"))
    return Store(str(tmp_path / "snapshots"))


def run(store: Store, *arguments: str) -> Result:
    keys = ["--no-encrypt"] if arguments[0] == "verify" and "--help" not in arguments else []
    return CliRunner().invoke(app, ["snapshot", *arguments, *keys, "--store", store.path])


def told(store: Store, *arguments: str, code: int = 0) -> dict[str, Any]:
    result = run(store, *arguments, "--json")
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    assert document["schema"] == 1
    return document


def test_an_empty_store_is_no_error(store: Store) -> None:
    assert told(store, "list")["snapshots"] == []
    assert "no snapshots" in run(store, "list").stdout


def test_list_tells_what_fits_and_what_can_not_be_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = add(store, "warm")
    os.mkdir(os.path.join(store.path, "broken"), 0o700)
    broken, warm = told(store, "list")["snapshots"]
    assert warm == {
        "name": "warm",
        "id": made.manifest.id,
        "created": "2023-11-14T22:13:20Z",
        "bytes_logical": made.manifest.bytes_logical,
        "bytes_stored": made.bytes_stored,
        "fits": True,
        "reason": None,
    }
    assert (broken["name"], broken["fits"], broken["id"]) == ("broken", False, None)
    assert "No such file" in broken["reason"]
    monkeypatch.setattr(mounts, "find", lambda mountpoint: None)
    assert told(store, "list")["snapshots"][1]["fits"] is False
    assert "does not fit: mountpoint here: none, there: /models" in run(store, "list").stdout


def test_without_criu_nothing_fits_but_everything_is_shown(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise MisfitError("snapshots need CRIU 4.1 or later")

    monkeypatch.setattr(machine, "fingerprint_here", refuse)
    add(store, "warm")
    assert told(store, "list")["snapshots"][0]["reason"] == "snapshots need CRIU 4.1 or later"
    assert "does not fit this machine: snapshots need CRIU" in run(store, "show", "warm").stdout


def test_show_tells_all_and_a_table_of_what_differs(store: Store) -> None:
    other = msgspec.structs.replace(FINGERPRINT, kernel="99.1", cpu="\x1b[31mred")
    add(store, "warm", fingerprint=other, phases={"dump": 0.5}, command=["serve\n", "--port"])
    document = told(store, "show", "warm")
    assert document["fits"] is False
    assert document["manifest"]["phases"] == {"dump": 0.5}
    assert [(one["what"], one["matters"]) for one in document["differences"]] == [
        ("processor", False),
        ("kernel", True),
    ]
    text = run(store, "show", "warm").stdout
    assert "\x1b" not in text
    assert "serve\\n --port" in text
    assert "does not fit this machine: kernel" in text
    assert told(store, "show", "none", code=1)["error"]["code"] == "name"


def test_verify_reads_everything_and_names_what_is_damaged(store: Store) -> None:
    made = add(store, "good")
    bad = add(store, "bad")
    document = told(store, "verify", "good")
    assert document["ok"] is True
    assert document["snapshots"][0].pop("seconds") >= 0
    expected = {"name": "good", "ok": True, "bytes": made.manifest.bytes_logical, "fault": None}
    assert document["snapshots"] == [expected]
    image = Path(bad.images, "pages-1.img")
    image.write_bytes(image.read_bytes()[:-1] + b"x")
    result = run(store, "verify", "good", "bad", "none")
    assert result.exit_code == 4
    assert "good: 16.0 KiB are as they were written" in result.stdout
    assert f"weightfs: {image}: its bytes are not those that were written" in result.stderr
    assert "there is no snapshot 'none'" in result.stderr
    assert [one["ok"] for one in told(store, "verify", "good", "bad", code=4)["snapshots"]] == [True, False]
    assert run(store, "verify", "none").exit_code == 1


def test_verify_without_a_name_verifies_all_that_the_key_is_for(store: Store, tmp_path: Path) -> None:
    add(store, "plain")
    add_chunked(store, "open")
    add_chunked(store, "sealed", master=MasterKey(secret=bytes(32)))
    os.mkdir(os.path.join(store.path, "broken"), 0o700)
    key = tmp_path / "key"
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    document = told(store, "verify", code=4)
    verdicts = {one["name"]: one["ok"] for one in document["snapshots"]}
    assert (verdicts, document["not_verified"]) == ({"broken": False, "open": True, "plain": True}, ["sealed"])
    os.rmdir(os.path.join(store.path, "broken"))
    result = CliRunner().invoke(app, ["snapshot", "verify", "--key-file", str(key), "--store", store.path])
    assert result.exit_code == 0
    assert "sealed: " in result.stdout
    assert "weightfs: open is not verified, for it is not encrypted" in result.stderr


def test_rm_removes_what_it_can_and_says_what_it_can_not(store: Store) -> None:
    for name in ("one", "two", "three"):
        add(store, name)
    os.mkdir(os.path.join(store.path, "broken"))
    Path(store.path, "file").write_text("no snapshot")
    Path(store.path, "link").symlink_to("one")
    with store.lock("two", shared=True):
        document = told(store, "rm", "one", "two", "broken", "file", "link", code=75)
        assert document["removed"] == ["one", "broken", "file", "link"]
        assert len(document["failed"]) == 1
        assert told(store, "rm", "two", code=75)["error"]["code"] == "retry"
    assert run(store, "rm", "two", "none").exit_code == 1
    assert os.listdir(store.path) == ["three"]


def test_prune_says_what_goes_and_removes_it(store: Store) -> None:
    now_ns = time.time_ns()
    for age, name in enumerate("abcd"):
        add(store, name, created_ns=now_ns - (age * DAY_NS + DAY_NS // 2))
    os.mkdir(os.path.join(store.path, "broken"))
    assert run(store, "prune").exit_code == 2
    assert run(store, "prune", "--older-than", "soon").exit_code == 2
    dry = told(store, "prune", "--older-than", "2d", "--dry-run")
    assert (dry["removed"], dry["kept"], dry["dry_run"]) == (["d", "c"], ["a", "b"], True)
    assert dry["bytes_freed"] > 0
    assert "d: would be removed" in run(store, "prune", "--older-than", "2d", "--dry-run").stdout
    with store.lock("d", shared=True):
        result = run(store, "prune", "--keep-last", "3", "--older-than", "2d")
    assert result.exit_code == 75
    assert "d" in os.listdir(store.path)
    assert told(store, "prune", "--max-size", "30KiB", "--keep-last", "1")["removed"] == ["d", "c", "b"]
    assert sorted(os.listdir(store.path)) == ["a", "broken"]


def test_each_has_help_with_an_example() -> None:
    for command in ("list", "show", "verify", "rm", "prune"):
        assert "Example: weightfs snapshot" in CliRunner().invoke(app, ["snapshot", command, "--help"]).output


def test_a_store_that_others_may_write_is_refused(store: Store) -> None:
    add(store, "warm")
    os.chmod(store.path, 0o777)
    assert told(store, "show", "warm", code=4)["error"]["path"] == store.path
    assert told(store, "rm", "warm", code=4)["error"]["code"] == "corrupt"
