"""A model server that never heard of weightfs: transformers behind HTTP.

    python _plain_server.py MODEL DEVICE PORT

`GET /` gives the next token's logits for a fixed prompt, as their largest's index and their sum; `GET /phases` how long
each part of its start took. It listens once it has answered itself, and writes nothing to stdout or stderr after that.
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
            answer = {"started": STARTED, "phases": phases} if self.path == "/phases" else token()
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


main()
