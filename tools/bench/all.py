"""Every benchmark here, one after the other, and one table in Markdown with the commands that made it.

python tools/bench/all.py > table.md
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from typing import Any

from _harness import COLUMNS, LEGEND, SCHEMA, describe_settings, parser

SCRIPTS = ("passthrough", "portable", "views", "metadata")


def run(script: str, arguments: list[str]) -> dict[str, Any]:
    """One script's document; its table and progress go to stderr."""
    here = os.path.dirname(os.path.abspath(__file__))
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out.json")
        command = [sys.executable, os.path.join(here, f"{script}.py"), *arguments, "--json", out]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr) as child:
            try:
                status = child.wait()
            except BaseException:
                child.terminate()  # it unmounts, then ends; `with` waits for it
                raise
        if status:
            raise SystemExit(f"{script}.py ended with status {status}")
        with open(out) as file:
            return dict(json.load(file))


def markdown(documents: list[dict[str, Any]], commands: dict[str, str]) -> list[str]:
    """The combined table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for document in documents:
        lines += ["| " + " | ".join(row["cells"]) + " |" for row in document["rows"]]
    lines += ["", LEGEND[0].upper() + LEGEND[1:], "", "Made by:", ""]
    lines += [f"    {command}" for command in commands.values()]
    lines += ["", "On:", ""]
    seen: dict[str, None] = {}
    for document in documents:
        settings = {**document["settings"], "residency": {}}
        seen |= dict.fromkeys(line for line in describe_settings(settings) if not line.startswith("kernel"))
    lines.append(f"- {describe_settings({**documents[0]['settings'], 'mounts': [], 'residency': {}})[0]}")
    lines += [f"- {line}" for line in seen]
    for document in documents:
        shares = document["settings"]["residency"].items()
        lines += [f"- {document['name']}: in memory before {phase}: {share:.1%}" for phase, share in shares]
    return lines


def main() -> None:
    """Run them."""
    options = parser(__doc__ or "").parse_args()
    arguments = ["--rounds", str(options.rounds), "--size", str(options.size)]
    if options.folder:
        arguments += ["--folder", options.folder]
    commands = {script: f"python tools/bench/{script}.py {shlex.join(arguments)}" for script in SCRIPTS}
    documents = []
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    for script, command in commands.items():
        print(f"{command}", file=sys.stderr, flush=True)
        documents.append(run(script, arguments))
    print("\n".join(markdown(documents, commands)))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"schema": SCHEMA, "benchmarks": documents}, file, indent=1)


if __name__ == "__main__":
    main()
