"""Snapshots without a process: manifests and stores to test with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from checkpoint.fingerprint import Fingerprint, Gpu
from checkpoint.manifest import Manifest
from checkpoint.store import Draft, Snapshot, Store

IMAGES: Mapping[str, bytes] = {
    "core-7.img": b"registers",
    "dump.log": b"",
    "pages-1.img": bytes(range(256)) * 64,
}
FINGERPRINT = Fingerprint(
    architecture="x86_64",
    page_bytes=4096,
    cpu="a processor",
    cpu_features=["avx2", "sse2", "xsave"],
    kernel="6.18.5-amd64",
    criu="4.1.1",
    driver="570.1",
    gpus=[Gpu(model="NVIDIA H100 80GB HBM3", memory_bytes=80 << 30)],
    mountpoint="/models",
    command=["server", "--port", "8000"],
)


def manifest_of(draft: Draft, **changes: Any) -> Manifest:
    """The manifest that a process with nothing special would have."""
    values: dict[str, Any] = {
        "name": draft.name,
        "id": draft.id,
        "created_ns": 1_700_000_000_000_000_000,
        "root_pid": 7,
        "pids": [7],
        "command": ["server"],
        "cwd": "/",
        "fingerprint": FINGERPRINT,
    }
    return Manifest(**(values | changes))


def add(
    store: Store, name: str, *, replace: bool = False, images: Mapping[str, bytes] = IMAGES, **changes: Any
) -> Snapshot:
    """Put a snapshot into a store."""
    with store.begin(name, replace=replace) as draft:
        for image, content in images.items():
            with open(os.path.join(draft.images, image), "wb") as file:
                file.write(content)
        return draft.commit(manifest_of(draft, **changes))
