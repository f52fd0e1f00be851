"""Snapshots without a process: manifests and stores to test with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from checkpoint.chunks.keys import MasterKey
from checkpoint.contents import Contents, Vault
from checkpoint.fingerprint import Fingerprint, Gpu
from checkpoint.ingestion import take_in
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


def add_chunked(
    store: Store,
    name: str,
    *,
    replace: bool = False,
    images: Mapping[str, bytes] = IMAGES,
    master: MasterKey | None = None,
    serial: int = 1,
    **changes: Any,
) -> Snapshot:
    """Put a snapshot that is not plain into a store; in this thread alone."""
    vault = Vault(store.path, master)
    with store.begin(name, replace=replace) as draft, vault.packs.begin(threads=0) as writer:
        for image, content in images.items():
            with open(os.path.join(draft.images, image), "wb") as file:
                file.write(content)
        taken = take_in(draft.images, [], writer, needed=0, threads=1)
        for image in images:
            os.unlink(os.path.join(draft.images, image))
        said = manifest_of(
            draft,
            content="recipes",
            is_encrypted=master is not None,
            files=taken.files,
            bytes_logical=sum(file.nbytes for file in taken.files),
            bytes_added=taken.bytes_added,
            **changes,
        )
        contents = Contents(generation=serial, recipes=taken.recipes)
        return draft.commit(said, sealed=lambda content: vault.seal(said.name, said.id, content, contents))
