"""`weightfs snapshot create` and `restore` of a real server on a real mount, as its operator runs them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.processes import start_ticks, tree_of
from tests.helpers.mounting import Mounter
from tests.helpers.served import Bench, await_gone, bench, is_running
from tests.helpers.targets import needs_criu_for_sockets

pytestmark = needs_criu_for_sockets


@pytest.fixture
def it(tmp_path: Path, mounter: Mounter) -> Iterator[Bench]:
    with bench(tmp_path, mounter) as made:
        yield made


def created(it: Bench, *extras: str) -> int:
    """A snapshot `warm` of the server, which has ended; gives its pid."""
    return int(it.told("create", "warm", "--ready-url", it.url + "answer", command=it.command(*extras))["pid"])


def restored(it: Bench) -> int:
    return int(it.told("restore", "warm", "--wait-url", it.url + "health")["pid"])


@pytest.mark.parametrize("plain", [False, True])
def test_a_server_is_started_snapshotted_and_restored(it: Bench, plain: bool) -> None:
    options = ["--plain"] if plain else []
    made = it.told("create", "warm", *options, "--ready-url", it.url + "answer", command=it.command())
    assert not it.answers()
    assert start_ticks(made["pid"]) is None, "its pid is free again"
    assert it.told("show", "warm")["manifest"]["listeners"] == [f"127.0.0.1:{it.port}"]
    assert made["name"] == "warm"
    assert {"look", "weights", "criu dump", "store", "finish"} <= made["phases"].keys()
    assert made["bytes"]["logical"] > 4 << 20
    assert (made["bytes"]["logical"] <= made["bytes"]["stored"]) is plain

    back = it.told("restore", "warm", "--wait-url", it.url + "health")
    assert (back["name"], back["id"], back["pid"], back["warnings"]) == ("warm", made["id"], made["pid"], [])
    assert {"fit", "weights", "criu restore", "ready", "verify" if plain else "lay out"} <= back["phases"].keys()
    answer = it.ask()
    assert (answer["weights"], answer["pid"], answer["served"]) == (it.expected(), back["pid"], 2)
    assert os.getsid(back["pid"]) == back["pid"], "it leads a session of its own"
    it.require_consistent("warm")


def test_a_server_that_runs(it: Bench) -> None:
    with it.server() as server:
        before = it.ask()
        made = it.told("create", "warm", "--pid", str(server.pid))
        assert made["pid"] == server.pid
        assert server.wait(30) == -signal.SIGKILL
        assert restored(it) == server.pid
        after = it.ask()
    same = ("weights", "heap", "pid", "threads")
    assert [after[key] for key in same] == [before[key] for key in same]
    assert after["served"] == before["served"] + 1


def test_left_running(it: Bench) -> None:
    with it.server() as server:
        before = it.ask()
        it.told("create", "warm", "--pid", str(server.pid), "--leave-running")
        assert is_running(server.pid)
        assert it.ask()["served"] == before["served"] + 1
        error = it.refused("restore", "warm", code=75)
        assert str(server.pid) in error["message"]
        assert it.ask()["served"] == before["served"] + 2
    await_gone(server.pid)
    restored(it)
    assert it.ask()["served"] == before["served"] + 1


def test_a_process_tree_and_threads(it: Bench) -> None:
    pid = created(it, "tree", "threads")
    assert restored(it) == pid
    answer = it.ask()
    assert len(answer["children"]) == 2
    assert answer["threads"] >= 4
    tree = tree_of(pid)
    assert len(tree) == 5
    assert all(is_running(one.pid) for one in tree)


def test_ended_processes_that_were_restored_free_their_pids(it: Bench) -> None:
    pid = created(it, "tree")
    for _ in range(2):
        assert restored(it) == pid
        pids = [one.pid for one in tree_of(pid)]
        for one in pids:
            os.kill(one, signal.SIGKILL)
        for one in pids:
            await_gone(one)


def test_the_mount_was_made_anew(it: Bench) -> None:
    created(it)
    assert it.mount.umount().returncode == 0
    assert it.mount.supervisor.has_ended(20)
    error = it.refused("restore", "warm", code=3)
    assert it.mount.mountpoint in f"{error['message']} {error['path']} {error['mend']}"
    it.mounter(it.mount.source, at=it.mount.mountpoint)
    restored(it)
    assert it.ask()["weights"] == it.expected()


def test_the_mounts_daemon_was_killed(it: Bench) -> None:
    created(it)
    it.mount.kill_daemon()
    restored(it)
    assert it.ask()["weights"] == it.expected()


def test_other_weights_of_the_same_size(it: Bench) -> None:
    pid = created(it)
    size = os.path.getsize(it.weights)
    with open(it.weights + ".new", "wb") as file:
        file.write(os.urandom(size))
    os.rename(it.weights + ".new", it.weights)
    error = it.refused("restore", "warm", code=4)
    assert error["path"].endswith("model.safetensors")
    assert start_ticks(pid) is None


def test_weights_rewritten_under_their_old_time(it: Bench) -> None:
    pid = created(it)
    before = os.stat(it.weights)
    with open(it.weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(it.weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    it.refused("restore", "warm", code=4)
    assert start_ticks(pid) is None


def test_weights_that_are_gone(it: Bench) -> None:
    pid = created(it)
    os.unlink(it.weights)
    error = it.refused("restore", "warm", code=3)
    assert error["path"].endswith("model.safetensors")
    assert start_ticks(pid) is None


def test_names(it: Bench) -> None:
    with it.server() as server:
        pid = str(server.pid)
        first = it.told("create", "warm", "--pid", pid, "--leave-running")
        assert it.refused("create", "warm", "--pid", pid, "--leave-running", code=1)["code"] == "name"
        assert it.ask()["pid"] == server.pid
        second = it.told("create", "warm", "--pid", pid, "--leave-running", "--replace")
        assert first["id"] != second["id"]
        assert it.refused("restore", "cold", code=1)["code"] == "name"
        assert it.told("show", "warm")["id"] == second["id"]
    it.refused("create", "warm", code=1, command=["/bin/true"])
    it.require_consistent("warm")


def test_targets_that_are_none(it: Bench) -> None:
    it.refused("create", "warm", "--pid", "4194304", code=1)
    it.refused("create", "warm", code=2)
    it.refused("create", "warm", "--pid", "1", code=2, command=["/bin/true"])
    error = it.refused("create", "warm", "--ready-file", "/nowhere", code=1, command=["/bin/false"])
    assert it.log in error["mend"]
    it.refused("create", "warm", "--ready-file", "/nowhere", code=1, command=["/bin/none of this name"])
    error = it.refused(
        "create", "warm", "--ready-file", "/nowhere", "--ready-timeout", "0.2", code=75, command=["/bin/sleep", "60"]
    )
    assert "0.2 s" in error["message"]
    it.require_consistent()


def test_a_log_that_has_grown(it: Bench) -> None:
    created(it)
    with open(it.log, "a") as log:
        log.write("from elsewhere\n")
    it.told("restore", "warm", "--wait-url", it.url + "health")
    it.ask()
    lines = it.log_text().splitlines()
    assert lines[0] == "served /answer"
    assert lines[-3:] == ["from elsewhere", "served /health", "served /answer"]


def test_its_own_log_where_none_is_named(it: Bench, tmp_path: Path) -> None:
    own = str(tmp_path / "own.log")
    with it.server(log=own) as server:
        it.told("create", "warm", "--pid", str(server.pid))
        server.wait(30)
        done = it.run("restore", "warm", "--wait-url", it.url + "health", "--log", own)
        assert done.returncode == 0, done.stderr
        assert Path(own).read_text().count("served /health") >= 2


def test_hooks(it: Bench) -> None:
    made = it.told("create", "warm", "--leave-running", command=it.command("point"))
    it.note(made["pid"])
    from tests.helpers.mounting import wait_until

    wait_until(it.answers, "the original answers")
    original = it.ask()
    assert (original["outcome"], original["reseeded"]) == ("continued", 0.0)
    assert "before the snapshot" in it.log_text()
    drawn = []
    for _ in range(2):
        for one in tree_of(made["pid"]):
            os.kill(one.pid, signal.SIGKILL)
        await_gone(made["pid"])
        back = it.told("restore", "warm", "--wait-url", it.url + "health")
        assert back["warnings"] == [], "hooks renew what clones must not share"
        answer = it.ask()
        assert answer["outcome"] == "restored"
        drawn.append(answer["reseeded"])
    assert len({0.0, *drawn}) == 3


def test_a_second_restore_without_hooks_warns(it: Bench) -> None:
    pid = created(it)
    drawn = []
    for warnings in (0, 1):
        back = it.told("restore", "warm", "--wait-url", it.url + "health")
        assert len(back["warnings"]) == warnings
        drawn.append(it.ask()["random"])
        os.kill(pid, signal.SIGKILL)
        await_gone(pid)
    assert drawn[0] == drawn[1], "which is what it warns of"
