"""A daemon writes into its state folder and nowhere else: everything else is read-only where it runs."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from tests.helpers.models import every_dtype, write, write_safetensors
from tests.helpers.mounting import Daemon, both_engines, wait_until
from tests.helpers.namespaces import Namespace

pytestmark = pytest.mark.alone  # a mount namespace keeps copies of the mounts of other tests

SHUT = r"""
set -e
mount --bind "$1" "$1"
cut -d' ' -f5 /proc/self/mountinfo | while read -r place; do
    case $place in "$1") ;; *) mount -o remount,bind,ro "$(printf '%b' "$place")" 2>/dev/null || : ;; esac
done
"""


@both_engines
def test_it_needs_no_other_place_to_write(tmp_path: Path, engine: str) -> None:
    source, mountpoint, state = (f"{tmp_path}/{name}" for name in ("source", "mount", "state"))
    for folder in (mountpoint, state):
        os.mkdir(folder)
    tensors = every_dtype()
    write_safetensors(f"{source}/model.safetensors", tensors)
    write(f"{source}/faulty.safetensors", b"nonsense")
    code = "from weightfs.cli.main import main; main()"
    with Namespace("-m", "--propagation", "private") as box:
        box.must("sh", "-c", SHUT, "sh", state)
        for folder in (str(tmp_path), "/tmp", "/run", "/etc", "/var/lib", os.path.expanduser("~"), os.getcwd()):
            if not box.run("sh", "-c", 'exec 3>"$1/.weightfs-test" && rm "$1/.weightfs-test"', "sh", folder).returncode:
                pytest.skip(f"this machine lacks a way to make {folder} read-only in a mount namespace")
        command = (sys.executable, "-c", code)
        options = ("--engine", engine, "--state-dir", state, "--json")
        made = box.run(*command, "mount", source, mountpoint, *options)
        assert made.returncode == 0, made.stderr
        document = json.loads(made.stdout)
        assert document["engine"] == engine
        daemon = Daemon(document["daemon_pid"])
        for name in ("t.F32", "t.U8"):
            assert box.must("cat", f"{mountpoint}/.tensors/model/{name}") == tensors[name].data
        assert box.must("cat", f"{mountpoint}/faulty.safetensors") == b"nonsense"
        assert box.run(*command, "status", mountpoint).returncode == 0
        wait_until(lambda: os.path.getsize(f"{state}/index.lmdb") > 0, "the index is written")
        assert box.run(*command, "umount", mountpoint).returncode == 0
        assert daemon.end() is None
    with open(f"{state}/weightfs.log") as log:
        text = log.read()
    assert "Read-only" not in text
    assert "Traceback" not in text
    # What it keeps is for its owner alone.
    for folder, _, files in os.walk(state):
        for name in files:
            assert stat.S_IMODE(os.stat(f"{folder}/{name}").st_mode) & 0o077 == 0, name
