"""No plugin of CRIU's own is ever loaded: its CUDA plugin would checkpoint the GPU a second time."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint import runtime
from checkpoint.criu import DumpOptions, dump, find_criu, restore, restore_options_of
from tests.helpers.targets import needs_criu, target, the_criu

pytestmark = [
    needs_criu,
    pytest.mark.skipif(shutil.which("cc") is None, reason="this machine lacks a C compiler"),
]

# criu/include/criu-plugin.h, as of 4.1: version 2, a table of hooks behind the descriptor.
PLUGIN = r"""
#include <fcntl.h>
#include <unistd.h>
static int started(int stage) { close(open(TRACE, O_CREAT | O_WRONLY, 0600)); return 0; }
static void ended(int stage, int ret) {}
struct { const char *name; int (*init)(int); void (*exit)(int, int); unsigned version, max_hooks; void *hooks[64]; }
CR_PLUGIN_DESC = { "cuda_plugin", started, ended, 2, 1, {0} };
"""


@pytest.fixture
def plugin(tmp_path: Path) -> tuple[str, Path]:
    """A folder with a plugin of that name, and the file that it makes once it is loaded."""
    folder, trace = tmp_path / "plugins", tmp_path / "loaded"
    folder.mkdir()
    (tmp_path / "plugin.c").write_text(PLUGIN)
    command = ["cc", "-shared", "-fPIC", f'-DTRACE="{trace}"', "-o", f"{folder}/cuda_plugin.so", f"{tmp_path}/plugin.c"]
    subprocess.run(command, check=True)
    return str(folder), trace


def test_none_is_loaded(tmp_path: Path, plugin: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, trace = plugin
    images = tmp_path / "images"
    images.mkdir()
    with target("tell(1)\nwait()", tmp_path) as one:
        one.said()
        careless = replace(the_criu(), libdir=folder)
        dump(careless, one.pid, str(images), DumpOptions(leave_running=True), 60)
        assert trace.exists(), "this plugin is one that CRIU loads where it finds it"
        trace.unlink()
        monkeypatch.setenv("CRIU_LIBS_DIR", folder)
        criu = find_criu()
        assert os.listdir(criu.libdir) == []
        dump(criu, one.pid, str(images), DumpOptions(), 60)
        one.process.wait(30)
        restore(criu, str(images), restore_options_of(DumpOptions()), 60)
        assert one.lives()
        assert not trace.exists()


@pytest.mark.parametrize("spoilt", ["with a plugin in it", "that others may write to"])
def test_the_folder_for_plugins_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str) -> None:
    folder = tmp_path / "no-criu-plugins"
    monkeypatch.setenv(runtime.VARIABLE, str(tmp_path))
    assert find_criu(check=False).libdir == str(folder)
    if spoilt == "with a plugin in it":
        (folder / "cuda_plugin.so").touch()
    else:
        folder.chmod(0o777)
    other = find_criu(check=False).libdir
    assert other != str(folder)
    assert os.listdir(other) == []
    os.rmdir(other)
