"""A process whose weights step aside for its snapshots: `python -m tests.helpers.released_child TOLD DEVICE WEIGHTS`.

DEVICE is `cuda`, or `double` for `MemoryDouble`. It is warm at a snapshot point. Asked for more by SIGUSR1 it goes
through another block, in which it waits for the next SIGUSR1, so that it can be snapshotted from outside. After every
step it tells what it found in the file TOLD, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from checkpoint import snapshot_point
from tests.helpers.memory_double import MemoryDouble
from weightfs.torch import Released, released
from weightfs.torch.released import _released

WIDTH: Final = {"cuda": 4096, "double": 512}


def write_weights(path: str, device: str, layers: int) -> int:
    """Weights for the child; gives how many bytes they are."""
    width = WIDTH[device]
    torch.manual_seed(0)
    content = {
        f"{number}.weight": (torch.randn(width, width, device="cuda" if device == "cuda" else "cpu") / width**0.5)
        .bfloat16()
        .cpu()
        for number in range(layers)
    }
    save_file(content, path)
    return layers * width * width * 2


class Child:
    def __init__(self, told: str, device: str, path: str) -> None:
        self.told, self.path = told, path
        self.double = MemoryDouble() if device == "double" else None
        self.device = torch.device("cpu" if self.double else "cuda")
        content = load_file(path)
        width = WIDTH[device]
        self.model = torch.nn.Sequential(
            *(torch.nn.Linear(width, width, bias=False, dtype=torch.bfloat16, device="meta") for _ in content)
        )
        self.model.load_state_dict({name: tensor.to(self.device) for name, tensor in content.items()}, assign=True)
        self.nbytes = sum(one.nbytes for one in self.model.parameters())
        self.x = torch.ones(16, width, dtype=torch.bfloat16, device=self.device)
        self.before = self.answer()
        self.graph: Any = None

    def answer(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(self.x).float().cpu()

    @contextmanager
    def released(self) -> Iterator[Released]:
        block = (
            _released(self.model, self.path, lambda _: self.double)
            if self.double
            else released(self.model, weights=self.path)
        )
        with block as report:
            yield report

    def move(self) -> None:
        """Give the weights their addresses, and capture a graph with these."""
        with self.released():
            pass
        self.addresses = [one.data_ptr() for one in self.model.parameters()]
        if self.double:
            return
        with torch.inference_mode():
            beside = torch.cuda.Stream()
            with torch.cuda.stream(beside):
                self.model(self.x)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self.model(self.x)
        self.graph.replay()
        self.of_graph = self.output.float().cpu()

    def replays(self) -> bool:
        if self.graph is None:
            return True
        with torch.inference_mode():
            self.output.zero_()
        self.graph.replay()
        return bool(torch.equal(self.output.float().cpu(), self.of_graph))

    def used(self) -> int:
        """Bytes of the GPU that are taken."""
        if self.double:
            return sum(self.double.mapped.values())
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    def tell(self, report: Released, **more: object) -> None:
        document = {
            "same": bool(torch.equal(self.answer(), self.before)),
            "graph": self.replays(),
            "stayed": self.addresses == [one.data_ptr() for one in self.model.parameters()],
            "nbytes": report.nbytes,
            "file_bytes": report.file_bytes,
            "kept": report.kept,
            "elsewhere": report.elsewhere,
            "torch_bytes": report.torch_bytes,
            "phases": report.phases,
            "used": self.used(),
            **more,
        }
        self.write(document)

    def write(self, document: dict[str, Any]) -> None:
        with open(self.told + ".new", "w", encoding="utf-8") as file:
            json.dump(document, file)
        os.rename(self.told + ".new", self.told)


def main() -> None:
    """See above."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    child = Child(*sys.argv[1:4])
    child.move()
    with child.released() as report:
        away = child.used()
        outcome = snapshot_point("warm")
    child.tell(report, away=away, outcome=outcome)
    while True:
        signal.sigwait({signal.SIGUSR1})
        with child.released() as report:
            away = child.used()
            child.write({"away": away})
            signal.sigwait({signal.SIGUSR1})
        child.tell(report, away=away)


if __name__ == "__main__":
    main()
