"""Record what this machine's driver answers: `tools/gpu/run tools/gpu/facts.py FILE [SCENARIO...]`, some 2 minutes.

FILE becomes tests/gpu/facts.json of the checkout: what the driver double is held to where there is no GPU. Every
process it makes is its own and ends with its scenario. It changes no setting of the GPU. With `mps` named, it starts
and ends an MPS daemon.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from checkpoint.cuda_channel import Helper
from checkpoint.cuda_helper import REAL_DRIVER
from checkpoint.cuda_program import Request
from tests.gpu.bench import real_bench
from tests.gpu.scenarios import ASKED_FOR, MODELLED, OBSERVED, Trace


def machine(helper: Helper) -> dict[str, Any]:
    devices = helper.ask(Request(call="devices"), 30).devices
    return {
        "kernel": os.uname().release,
        "driver": helper.version(),
        "gpus": [{"name": one.name, "total_bytes": one.total_bytes, "mig": one.mig} for one in devices],
    }


def main() -> None:
    path, *names = sys.argv[1:]
    chosen = [
        one
        for one in (*MODELLED, *OBSERVED, *ASKED_FOR)
        if one.__name__ in names or (not names and one not in ASKED_FOR)
    ]
    started = time.monotonic()
    helper = Helper(REAL_DRIVER, 120)
    document: dict[str, Any] = {"machine": machine(helper), "open_s": round(time.monotonic() - started, 3)}
    helper.close()
    print(json.dumps(document), flush=True)
    traces: dict[str, Any] = {}
    for scenario in chosen:
        started = time.monotonic()
        with real_bench() as bench:
            trace = Trace(bench)
            try:
                scenario(trace)
            except Exception as error:  # noqa: BLE001  one that breaks is a fact as well
                trace.calls.append({"broke": f"{type(error).__name__}: {error}"})
        traces[scenario.__name__] = trace.calls
        print(f"{scenario.__name__}: {time.monotonic() - started:.1f} s", flush=True)
        for call in trace.calls:
            print("   ", *(f"{key}={value}" for key, value in call.items()), flush=True)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(document | {"traces": traces}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
