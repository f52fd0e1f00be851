"""llama.cpp's server (the one in xllamacpp) with a GGUF on a mount: dumped when warm, it completes the same again."""

from __future__ import annotations

import importlib.util
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any, Final

import pytest

from checkpoint.processes import tree_of
from checkpoint.store import Store
from tests.helpers.mounting import Mounter, wait_until_settled
from tests.helpers.served import Commands, await_gone, free_port
from tests.helpers.targets import needs_criu_for_sockets
from tests.helpers.tiny_llama import write_tiny_llama

pytestmark = needs_criu_for_sockets

SERVER: Final = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
params.n_ctx, params.n_parallel, params.warmup = 256, 1, True
params.cpuparams.n_threads = 2
server = xllamacpp.Server(params)
while True:
    threading.Event().wait(60)
"""


def completion(url: str) -> list[dict[str, Any]]:
    question = {"prompt": "hello world", "temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        choices: list[dict[str, Any]] = json.load(reply)["choices"]
    return choices


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="this machine lacks xllamacpp")
def test_completes_the_same_again(tmp_path: Path, mounter: Mounter) -> None:
    source = tmp_path / "models"
    source.mkdir()
    write_tiny_llama(str(source / "tiny.gguf"))
    wait_until_settled(str(source / "tiny.gguf"))
    mount = mounter(str(source))
    commands = Commands(tmp_path)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    program = [sys.executable, "-c", SERVER, mount.path("tiny.gguf"), str(port)]
    try:
        ready = ("--ready-url", f"{url}/health")
        pid = commands.told("create", "cold", *ready, "--leave-running", command=program)["pid"]
        commands.note(pid)
        before = completion(url)
        assert json.dumps(before).count('"logprob"') >= 3
        commands.told("create", "warm", "--pid", str(pid))  # after its first request
        await_gone(pid)
        weights = Store(commands.store).open("warm").manifest.weights
        assert [one.path for one in weights] == ["tiny.gguf"]
        assert commands.told("restore", "warm", "--wait-url", f"{url}/health")["pid"] == pid
        assert tree_of(pid)[0].threads > 2
        assert completion(url) == before
    finally:
        commands.close()
