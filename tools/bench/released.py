"""What it takes weights to leave a GPU and to come back, part by part, without a snapshot in between.

    tools/gpu/run tools/bench/released.py --json FILE      on the GPU machine: 7.2 GB, about 2 minutes

A model of transformers, loaded by an unmodified `from_pretrained`, goes through blocks of `weightfs.torch.released`;
its answer must be the same after each. The first block also moves the weights, and proves all of them; the others prove
by sums. `reload` is what a restore waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Final

HERE: Final = os.path.dirname(os.path.abspath(__file__))


def measure(folder: str, rounds: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from weightfs.torch import released

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda").eval()
    prompt = torch.arange(1, 17, device="cuda")[None]

    def answer() -> Any:
        with torch.inference_mode():
            return model(prompt).logits.float().cpu()

    before = answer()
    samples: list[dict[str, float]] = []
    for number in range(rounds + 1):
        free = torch.cuda.mem_get_info()[0]
        with released(model) as report:
            torch.cuda.synchronize()
            freed = torch.cuda.mem_get_info()[0] - free
            left = time.perf_counter()
        reload_s = time.perf_counter() - left
        started = time.perf_counter()
        same = bool(torch.equal(answer(), before))
        sample = dict(report.phases) | {"reload": reload_s, "answer": time.perf_counter() - started}
        samples.append(sample)
        parts = ", ".join(f"{name} {seconds:.4f}" for name, seconds in sample.items())
        print(f"block {number}: {'' if same else 'OTHER ANSWER '}{parts}; freed {freed}", file=sys.stderr)
        if not same:
            raise SystemExit("the model answers otherwise than before")
    first, *others = samples
    middle = {name: round(statistics.median(one[name] for one in others), 4) for name in others[0]}
    return {
        "device": torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "nbytes": report.nbytes,
        "file_bytes": report.file_bytes,
        "kept": report.kept,
        "torch_bytes": report.torch_bytes,
        "first": {name: round(seconds, 4) for name, seconds in first.items()},
        "median": middle,
        "copy_gb_s": round(report.file_bytes / middle["copy"] / 1e9, 1),
        "reload_gb_s": round(report.nbytes / middle["reload"] / 1e9, 1),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gigabytes", type=float, default=7.2, help="size of the weights (default 7.2)")
    options.add_argument("--rounds", type=int, default=5, help="blocks after the first (default 5)")
    options.add_argument("--folder", default=None, help="where the model goes (default: a temp folder)")
    options.add_argument("--json", default=None, metavar="FILE", help="write the figures there")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="released-", dir=given.folder) as folder:
        model = os.path.join(folder, "model")
        script = os.path.join(HERE, "_random_llama.py")
        subprocess.run([sys.executable, script, model, str(given.gigabytes), "cuda"], check=True, stdout=sys.stderr)
        report = measure(model, given.rounds)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
