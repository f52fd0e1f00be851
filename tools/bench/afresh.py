"""What later snapshots of a server add to its store: of the same process, and of a process that was started anew.

The server is a small Llama of random weights that transformers runs on the processor, encrypted; its memory is nearly
all Python's heap and libraries' data. It is started twice, snapshotted when it has answered, and the second one is
snapshotted again after another answer. All of that once as usual, and once with addresses that are not randomised
(setarch -R) and PYTHONHASHSEED=0, so that pointers in the heap may be the same. Needs root, CRIU, torch, transformers.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from typing import Any, Final

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from _harness import MIB, Report, parser, workplace
from _snapshotting import call, new_key

from checkpoint.processes import start_ticks

PROGRAM: Final = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=256, intermediate_size=704, num_attention_heads=8,
                                     num_key_value_heads=4, vocab_size=4096, num_hidden_layers=4)).eval()
while True:
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    open(sys.argv[1], "w").close()
    signal.sigwait({signal.SIGUSR1})
"""
_FIXED: Final = ("setarch", "-R", "env", "PYTHONHASHSEED=0")
_ANSWER_S: Final = 60


def measure(report: Report, place: str, what: str, before: tuple[str, ...]) -> None:
    """The rows of one way to start it.

    Args:
        report: takes them.
        place: an empty folder.
        what: the way, for people.
        before: the command that starts it so.
    """
    program, ready = os.path.join(place, "server.py"), os.path.join(place, "ready")
    with open(program, "w") as file:
        file.write(PROGRAM)
    common = ["--store", os.path.join(place, "snapshots"), *new_key(place)]

    def started(name: str) -> dict[str, Any]:
        options = ["--ready-file", ready, "--leave-running", "--log", os.path.join(place, "log"), *common]
        return call(place, ["create", name, *options, "--", *before, sys.executable, program, ready])

    first = started("first")
    end(first["pid"])
    os.unlink(ready)
    second = started("second")
    try:
        os.unlink(ready)
        os.kill(second["pid"], signal.SIGUSR1)
        until = time.monotonic() + _ANSWER_S
        while not os.path.exists(ready):
            if time.monotonic() > until:
                raise SystemExit(f"the server does not answer: see {place}/log")
            time.sleep(0.01)
        again = call(place, ["create", "again", "--pid", str(second["pid"]), "--leave-running", *common])
    finally:
        end(second["pid"])
    stored = [one["bytes"]["stored"] for one in (first, second, again)]
    report.value(f"{what}: the first snapshot", stored[0] / MIB, "MiB")
    report.value(f"{what}: another start adds, by the first", stored[1] / stored[0], "x")
    report.value(f"{what}: the same process later adds, by the first", stored[2] / stored[0], "x")


def end(pid: int) -> None:
    """End a server, and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    while start_ticks(pid) is not None:
        time.sleep(0.005)


def main() -> None:
    """Run it."""
    given: argparse.Namespace = parser(__doc__ or "").parse_args()
    if os.geteuid():
        raise SystemExit("snapshots need root")
    report = Report("afresh", given)
    for what, before in (("as usual", ()), ("same addresses and hashes", _FIXED)):
        with workplace(given.folder) as place:
            measure(report, place, what, before)
    report.finish()


if __name__ == "__main__":
    main()
