"""A model server whose weights step aside for its snapshot: transformers behind HTTP, started as `_plain_server.py` is.

    python _released_server.py MODEL DEVICE PORT
    weightfs snapshot create NAME -- python _released_server.py MODEL DEVICE PORT

`GET /` answers as there. `GET /phases` gives how long each part of its start took, and below `reload` the parts of the
last reload of the weights, which after a restore is the one of this restore. It listens on its port before the
snapshot point, so that a request sent to a restored one waits in the kernel until the weights are back. It writes
nothing to stdout or stderr after its start.
"""

import time

STARTED = time.time()

import json  # noqa: E402
import sys  # noqa: E402
from http.server import BaseHTTPRequestHandler, HTTPServer  # noqa: E402
from typing import Any  # noqa: E402


def main() -> None:
    path, device, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    phases: dict[str, float] = {}
    last = STARTED

    def phase(name: str) -> None:
        nonlocal last
        now = time.time()
        phases[name] = now - last
        last = now

    import torch

    phase("import torch")
    from transformers import AutoModelForCausalLM

    phase("import transformers")
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.init()
        torch.zeros(1, device=device)
    phase("open the GPU")
    where = {"device_map": device} if on_gpu else {}  # which needs accelerate
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **where).eval()
    if on_gpu:
        torch.cuda.synchronize()
    phase("load weights")
    prompt = torch.arange(1, 17, device=device)[None]

    def token() -> dict[str, Any]:
        with torch.inference_mode():
            logits = model(prompt).logits[0, -1].float()
        return {"token": int(logits.argmax()), "sum": float(logits.sum())}

    token()
    phase("first token")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = document() if self.path == "/phases" else token()
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    def document() -> dict[str, Any]:
        return {"started": STARTED, "phases": phases, "point": outcome, "reload": dict(weights.phases)}

    from checkpoint import snapshot_point
    from weightfs.torch import released

    server = HTTPServer(("127.0.0.1", port), Handler)
    last = time.time()
    with released(model) as weights:
        phase("release weights")
        outcome = snapshot_point("warm")
        last = time.time()
    phase("reload weights")
    server.serve_forever()


main()
