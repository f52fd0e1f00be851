"""A process in namespaces of its own, as in a container, with its mounts taken from outside."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint.attachments import attachments_of, stand_ins
from checkpoint.criu import dump, options_for, restore, restore_options_of
from checkpoint.preflight import examine
from checkpoint.processes import children_of, tree_of
from checkpoint.sockets import sockets_of
from tests.helpers.mounting import Mounter, both_engines
from tests.helpers.targets import Target, end, needs_criu, target, the_criu

pytestmark = [needs_criu, pytest.mark.alone]

INSIDE = """
subprocess = __import__("subprocess")
mapped = mmap.mmap(os.open(sys.argv[2], os.O_RDONLY), 0, prot=mmap.PROT_READ)
listener = socket.socket()
listener.bind(("0.0.0.0", 8080))
listener.listen()
while True:
    tell([mapped[:].decode(), os.getpid(), listener.getsockname()[1]])
    wait()
"""


@pytest.mark.parametrize("propagation", ["private", "shared"])
@both_engines
def test_like_a_container(mounter: Mounter, tmp_path: Path, engine: str, propagation: str) -> None:
    source, images = tmp_path / "source", tmp_path / "images"
    source.mkdir()
    images.mkdir(mode=0o700)
    (source / "weights").write_text("bytes")
    mount = mounter(str(source), engine)
    namespaces = ("--pid", "--mount", f"--propagation={propagation}", "--mount-proc", "--net", "--ipc", "--uts")
    isolated = ("unshare", "--fork", *namespaces, "setsid")
    with target(INSIDE, tmp_path, mount.path("weights"), prefix=isolated) as outer:
        before = outer.said()
        assert before == str(["bytes", 1, 8080])
        (inner,) = children_of(outer.pid)
        tree = tree_of(inner)
        findings = examine(tree, criu=the_criu(), weights_roots=[mount.mountpoint])
        assert not findings, [str(each) for each in findings]
        sockets = sockets_of(tree)
        assert [each.local for each in sockets.values()] == ["0.0.0.0:8080"]
        options = options_for(tree, sockets)
        dump(the_criu(), inner, str(images), options, 60)
        outer.process.wait(30)
        mount.kill_daemon()
        with stand_ins(each for each in attachments_of(tree, sockets) if each.needed) as pairs:
            pid = restore(the_criu(), str(images), replace(restore_options_of(options), inherit=pairs), 60)
        try:
            again = Target(outer.process, outer.told)
            again.pid = pid
            assert again.ask() == before
            assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
            listening = ["nsenter", f"--net=/proc/{pid}/ns/net", "cat", "/proc/net/tcp"]
            assert ":1F90" in subprocess.run(listening, capture_output=True, text=True, check=True).stdout
        finally:
            end(pid)
