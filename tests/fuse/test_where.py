"""Where a mount is seen and works: other mount namespaces, user namespaces, idmapped mounts, memory control groups."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.models import every_dtype, write, write_safetensors
from tests.helpers.mounting import Mounter, both_engines, needs_passthrough, wait_until, weightfs
from tests.helpers.namespaces import Namespace, idmapped
from tests.helpers.users import User, as_user
from weightfs import linux

pytestmark = pytest.mark.alone  # a mount namespace keeps copies of the mounts of other tests

MIB = 1 << 20
TENSORS = every_dtype()


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A model for everyone, and a file for its owner alone."""
    root = f"{tmp_path}/source"
    write_safetensors(f"{root}/model.safetensors", TENSORS)
    os.chmod(write(f"{root}/private", b"private"), 0o600)
    os.chmod(f"{root}/model.safetensors", 0o644)
    os.chmod(root, 0o755)
    return root


@contextlib.contextmanager
def mounted_on_itself(folder: str, propagation: str) -> Iterator[str]:
    os.makedirs(folder, exist_ok=True)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", f"--make-{propagation}", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# Other mount namespaces


@both_engines
def test_a_mount_made_later_reaches_a_container_that_runs(
    tmp_path: Path, source: str, mounter: Mounter, engine: str
) -> None:
    """The folder above is shared, the container has it as a slave: `-v /srv:/srv:rslave`, or all of `/`."""
    with mounted_on_itself(f"{tmp_path}/above", "shared") as above, Namespace("-m", "--propagation", "slave") as box:
        mount = mounter(source, engine, at=f"{above}/models")
        path = f"{above}/models/.tensors/model/t.F32"
        assert box.must("cat", path) == TENSORS["t.F32"].data
        assert mount.umount().returncode == 0
        wait_until(lambda: mount.mountpoint.encode() not in box.must("cat", "/proc/self/mountinfo"), "it is gone there")
        assert box.run("cat", path).returncode
        mounter(source, engine, at=f"{above}/models")
        assert box.must("cat", path) == TENSORS["t.F32"].data


@both_engines
def test_the_mountpoint_bound_as_docker_does(tmp_path: Path, source: str, mounter: Mounter, engine: str) -> None:
    """`-v /models:/models:ro,rslave` where /models is the mountpoint: what is mounted there later shows."""
    with (
        mounted_on_itself(f"{tmp_path}/models", "shared") as models,
        Namespace("-m", "--propagation", "slave") as box,
    ):
        inside = f"{tmp_path}/inside"
        os.mkdir(inside)
        for command in (["--rbind", models, inside], ["--make-rslave", inside], ["-o", "remount,bind,ro", inside]):
            box.must("mount", *command)
        mounter(source, engine, at=models)
        assert box.must("cat", f"{inside}/.tensors/model/t.F32") == TENSORS["t.F32"].data


@both_engines
def test_a_private_container_keeps_the_mount_it_started_with(source: str, mounter: Mounter, engine: str) -> None:
    """Docker's default: neither the umount nor a later mount shows there. The old daemon serves as long as it runs."""
    mount = mounter(source, engine)
    path = mount.path(".tensors/model/t.F32")
    with Namespace("-m", "--propagation", "private") as box:
        done = mount.umount()
        assert done.returncode == 75
        assert "its supervisor" in done.stderr
        assert box.must("cat", path) == TENSORS["t.F32"].data
        again = mounter(source, engine, at=mount.mountpoint, state_dir=mount.state_dir)
        inside = json.loads(box.must("cat", mount.path(".weightfs/status.json")))
        assert inside["supervisor_pid"] == mount.supervisor.pid
        assert again.live()["supervisor_pid"] == again.supervisor.pid
    assert mount.supervisor.has_ended(20)
    assert again.live()["supervisor_pid"] == again.supervisor.pid
    assert again.control("status")["supervisor_pid"] == again.supervisor.pid


# User namespaces


@both_engines
def test_another_user_namespace_reads_a_mount_for_everyone(source: str, mounter: Mounter, engine: str) -> None:
    """Its root is a user like others: what is for the owner alone is not for it, unless it is the owner's own."""
    mount = mounter(source, engine)
    with Namespace("--user", "--map-root-user") as box:
        kinds = "-U --preserve-credentials"
        assert box.must("cat", mount.path(".tensors/model/t.F32"), kinds=kinds) == TENSORS["t.F32"].data
        assert box.must("cat", mount.path("private"), kinds=kinds) == b"private"  # root is mapped to itself
    code = """
result = subprocess.run(
    ["unshare", "--user", "--map-root-user", "sh", "-c", "id -u; cat private || cat .tensors/model/t.F32 | wc -c"],
    capture_output=True, text=True,
).stdout.split()
"""
    said = as_user(User(1236, 1236), mount.mountpoint, code)
    assert said == ["0", str(len(TENSORS["t.F32"].data))]


@both_engines
def test_without_allow_other_it_does_not(source: str, mounter: Mounter, engine: str) -> None:
    mount = mounter(source, engine, "--no-allow-other")
    assert as_user(User(1236, 1236), mount.mountpoint, "result = answer(os.listdir, '.')") == f"errno {errno.EACCES}"


def test_mounting_in_a_user_namespace(tmp_path: Path, source: str) -> None:
    """Its root may mount; the engine is the portable one and says why, and passthrough is refused by name."""
    mountpoint = f"{tmp_path}/mount"
    os.mkdir(mountpoint)
    options = ("--state-dir", f"{tmp_path}/state", "--json")
    with Namespace("--user", "--map-root-user", "--mount") as box:
        kinds = "-U -m --preserve-credentials"
        if box.run("sh", "-c", "exec 3<>/dev/fuse", kinds=kinds).returncode:
            pytest.skip("this machine lacks a /dev/fuse that opens in a user namespace")

        code = "from weightfs.cli.main import main; main()"

        def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
            return box.run(sys.executable, "-c", code, *arguments, kinds=kinds)

        refused = run("mount", source, mountpoint, "--engine", "passthrough", *options)
        assert refused.returncode == 3
        assert "user namespace" in json.loads(refused.stdout)["error"]["message"]
        made = run("mount", source, mountpoint, *options)
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout)["engine"] == "portable"
        assert "user namespace" in json.loads(made.stdout)["reason"]
        assert box.must("cat", f"{mountpoint}/.tensors/model/t.F32", kinds=kinds) == TENSORS["t.F32"].data
        assert run("umount", mountpoint).returncode == 0


# Idmapped mounts


def needs_idmapped_fuse() -> None:
    if linux.kernel_version() < (6, 12):
        pytest.skip("this machine lacks idmapped FUSE mounts (kernel < 6.12)")


@both_engines
def test_an_idmapped_mount_of_the_mount(tmp_path: Path, source: str, mounter: Mounter, engine: str) -> None:
    """As Kubernetes binds a volume for a pod with a user namespace: root's files belong to the pod's root."""
    needs_idmapped_fuse()
    os.mkdir(f"{tmp_path}/mapped")
    mount = mounter(source, engine)
    look = "result = [answer(content, 'private'), answer(content, '.tensors/model/t.F32'), attributes('private')[1:3]]"
    with idmapped(mount.mountpoint, f"{tmp_path}/mapped", 5000):
        content, tensor, owner = as_user(User(5000, 5000), f"{tmp_path}/mapped", look)
        assert (len(content), len(tensor), owner) == (64, 64, [5000, 5000])
        content, tensor, owner = as_user(User(5001, 5001), f"{tmp_path}/mapped", look)
        assert (content, len(tensor), owner) == (f"errno {errno.EACCES}", 64, [5000, 5000])
    assert as_user(User(5000, 5000), mount.mountpoint, look)[0] == f"errno {errno.EACCES}"


@both_engines
def test_an_idmapped_mount_as_the_source(tmp_path: Path, source: str, mounter: Mounter, engine: str) -> None:
    os.mkdir(f"{tmp_path}/mapped")
    try:
        with idmapped(source, f"{tmp_path}/mapped", 5000):
            mount = mounter(f"{tmp_path}/mapped", engine)
            look = "result = [answer(content, 'private'), attributes('private')[1:3]]"
            assert as_user(User(5000, 5000), mount.mountpoint, look)[1] == [5000, 5000]
            assert len(as_user(User(5000, 5000), mount.mountpoint, look)[0]) == 64
            assert as_user(User(5001, 5001), mount.mountpoint, look)[0] == f"errno {errno.EACCES}"
            mount.umount()
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        pytest.skip("this machine lacks idmapped mounts on the filesystem of its temporary folder")


# Memory control groups


@pytest.fixture
def memory_group() -> Iterator[str]:
    """A control group of version 2 with 64 MiB, below the one that the tests run in."""
    with open("/proc/self/cgroup") as table:
        ours = next((line.rstrip("\n")[3:] for line in table if line.startswith("0::")), None)
    parent = f"/sys/fs/cgroup{ours}" if ours is not None else ""
    try:
        with open(f"{parent}/cgroup.subtree_control") as handed_on:
            if "memory" not in handed_on.read().split():
                pytest.skip(f"this machine lacks a memory controller that {parent} hands on (cgroup 2)")
        os.mkdir(group := f"{parent}/weightfs-test-{os.getpid()}")
    except OSError as e:
        pytest.skip(f"this machine lacks a control group that tests may use (cgroup 2, delegated): {e}")
    try:
        with open(f"{group}/memory.max", "w") as limit:
            limit.write(str(64 * MIB))
        yield group
    finally:
        os.rmdir(group)


@needs_passthrough
def test_a_reader_in_a_memory_group_pays_for_its_own_pages(tmp_path: Path, mounter: Mounter, memory_group: str) -> None:
    """As on the bare file: passthrough charges the reader, and its limit does not stop it."""
    path = write(f"{tmp_path}/source/weights", os.urandom(256 * MIB))
    mount = mounter(f"{tmp_path}/source", "passthrough")
    code = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
fd = os.open(sys.argv[2], os.O_RDONLY)
got = 0
while part := len(os.read(fd, 1 << 20)):
    got += part
stat = dict(line.split() for line in open(sys.argv[1] + "/memory.stat"))
print(got, stat["file"])
"""
    for place in (path, mount.path("weights")):
        os.sync()
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        done = subprocess.run(
            [sys.executable, "-c", code, memory_group, place], capture_output=True, text=True, check=True, timeout=60
        )
        got, charged = map(int, done.stdout.split())
        assert got == 256 * MIB
        assert 16 * MIB < charged <= 64 * MIB


# What a daemon sets for itself


@both_engines
def test_limits_of_a_daemon(source: str, mounter: Mounter, engine: str) -> None:
    mount = mounter(source, engine)
    with open(f"/proc/{mount.daemon_pid()}/limits") as limits:
        soft, hard = next(line.split()[3:5] for line in limits if line.startswith("Max open files"))
    assert soft == hard
    with open(f"/proc/{mount.daemon_pid()}/oom_score_adj") as score, open("/proc/self/oom_score_adj") as ours:
        expected = linux.OOM_SCORE if linux.has_capability(linux.CAP_SYS_RESOURCE) else int(ours.read())
        assert int(score.read()) == expected


def test_more_files_than_select_can_count(tmp_path: Path, mounter: Mounter) -> None:
    """2,000 files open and mapped at once."""
    for number in range(2000):
        write(f"{tmp_path}/source/{number}", b"%d" % number)
    linux.raise_file_limit()
    mount = mounter(f"{tmp_path}/source")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(mount.path(str(number)), "rb")) for number in range(2000)]
        for number, file in enumerate(files):
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == b"%d" % number
        assert weightfs("status", mount.mountpoint, "--json").returncode == 0


def test_doctor_names_all_this() -> None:
    done = weightfs("doctor", "--json")
    assert done.returncode == 0
    names = {check["name"] for check in json.loads(done.stdout)["checks"]}
    assert {
        "propagation", "user-namespace", "idmapped-mounts", "open-files", "oom", "cgroup", "watches"
    } <= names  # fmt: skip
