"""A server whose process is snapshotted before it opens the GPU: imports are in the snapshot, weights are not.

    python _imported_server.py MODEL DEVICE PORT

What process checkpoints give by themselves, without those of CUDA: after a restore it opens the GPU and loads the
weights as any other. Answers as `_plain_server.py` does; `GET /phases` has as `reload` what it did after the restore.
"""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


def main() -> None:
    path, device, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 - imported lazily otherwise

    from checkpoint import snapshot_point

    snapshot_point("imported")
    inside: dict[str, float] = {}
    last = time.time()

    def phase(name: str) -> None:
        nonlocal last
        now = time.time()
        inside[name] = now - last
        last = now

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.init()
        torch.zeros(1, device=device)
    phase("open the GPU")
    where = {"device_map": device} if on_gpu else {}
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
            answer = {"reload": inside} if self.path == "/phases" else token()
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


main()
