"""Weight files of a snapshot: recognised by what is in them, wherever they are mounted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from checkpoint import weights
from checkpoint.digest_cache import DigestCache
from checkpoint.errors import CheckpointError, CorruptError, MisfitError
from checkpoint.in_use import named_weights
from checkpoint.manifest import Manifest, Mount
from checkpoint.weights import check_weights, identify, seen_by, unchanged_since
from tests.helpers.snapshots import FINGERPRINT


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    (folder / "llama").mkdir(parents=True)
    for name in ("one", "two"):
        path = folder / "llama" / f"{name}.safetensors"
        path.write_bytes(name.encode() * 1000)
        os.utime(path, (1, 1))
    return folder


def manifest(models: Path, **changes: Any) -> Manifest:
    found = identify([str(path) for path in models.rglob("*.safetensors")], mountpoints=[str(models)])
    values: dict[str, Any] = {
        "name": "warm",
        "id": "0" * 32,
        "created_ns": 0,
        "root_pid": 1,
        "pids": [1],
        "command": [],
        "cwd": "/",
        "fingerprint": FINGERPRINT,
        "mount": Mount(mountpoint=str(models), source="/srv"),
        "weights": list(found.weights),
    }
    return Manifest(**(values | changes))


def test_what_lies_on_a_mount_is_known_by_its_path_below_it(models: Path, tmp_path: Path) -> None:
    beside = tmp_path / "models-not"
    beside.write_bytes(b"x")
    found = identify([str(beside), str(models / "llama" / "one.safetensors")], mountpoints=[str(models)])
    assert {(one.path, one.mountpoint, one.nbytes) for one in found.weights} == {
        (str(beside), None, 1),
        ("llama/one.safetensors", str(models), 3000),
    }
    unchanged_since(found.identities)


def test_weights_that_are_somewhere_else_are_not_there(models: Path, tmp_path: Path) -> None:
    said = manifest(models)
    assert set(check_weights(said)) == {str(models / "llama" / f"{name}.safetensors") for name in ("one", "two")}
    models.rename(tmp_path / "elsewhere")
    with pytest.raises(MisfitError, match="not there"):
        check_weights(said)


def test_weights_are_found_below_the_root_of_another_mount_namespace(models: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    models.rename(root / "models")
    found = identify(["/models/llama/one.safetensors"], root=str(root))
    assert found.weights[0].path == "/models/llama/one.safetensors"
    said = manifest(root / "models", mount=None, weights=list(found.weights))
    identities = check_weights(said, root=str(root))
    assert list(identities) == [str(root / "models/llama/one.safetensors")]
    inside = seen_by(7, said, identities, root=str(root))
    assert inside == {"/proc/7/root/models/llama/one.safetensors": identities[next(iter(identities))]}


def test_weights_on_a_mount_are_found_where_it_is_mounted_outside(models: Path, tmp_path: Path) -> None:
    """Below the root filesystem of a container there is but an empty folder at that path."""
    said = manifest(models)
    identities = check_weights(said, root=str(tmp_path / "root"))
    assert set(identities) == {str(models / "llama" / f"{name}.safetensors") for name in ("one", "two")}
    inside = seen_by(os.getpid(), said, identities, root=str(tmp_path / "root"))
    assert set(inside) == {f"/proc/{os.getpid()}/root{path}" for path in identities}
    unchanged_since(inside)


@pytest.mark.parametrize("content", [b"ONE" * 1000, b"one" * 999], ids=["other bytes", "shorter"])
def test_other_content_is_named(models: Path, content: bytes) -> None:
    said = manifest(models)
    path = models / "llama" / "one.safetensors"
    path.write_bytes(content)
    os.utime(path, (1, 1))
    with pytest.raises(CorruptError) as raised:
        check_weights(said)
    assert raised.value.path == str(path)
    assert raised.value.exit_code == 4


def test_unchanged_files_are_not_read_again(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = manifest(models)
    monkeypatch.setattr("checkpoint.digest_cache.YOUNG_NS", -(10**12))  # as if they had been there for long
    with DigestCache(str(tmp_path / "digests.db")) as cache:
        check_weights(said, cache=cache)
        with monkeypatch.context() as patch:
            patch.setattr(weights, "digest_files", lambda paths: {path: pytest.fail(path) for path in paths})
            check_weights(said, cache=cache)
        path = models / "llama" / "two.safetensors"
        path.write_bytes(b"TWO" * 1000)
        os.utime(path, (1, 1))
        with pytest.raises(CorruptError, match="other weights"):
            check_weights(said, cache=cache)


def test_a_file_that_changed_since_is_named(models: Path) -> None:
    identities = check_weights(manifest(models))
    path = models / "llama" / "two.safetensors"
    os.utime(path, (1, 1))
    with pytest.raises(CorruptError, match="changed") as raised:
        unchanged_since(identities)
    assert raised.value.path == str(path)
    path.unlink()
    with pytest.raises(CorruptError, match="any more"):
        unchanged_since(identities)


def test_what_can_not_be_read_is_no_corruption(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file") as raised:
        identify([str(tmp_path / "none")])
    assert raised.value.exit_code == 1


def test_weights_that_a_command_line_names(tmp_path: Path) -> None:
    model, blobs = tmp_path / "models" / "m", tmp_path / "models" / "blobs"
    for folder in (model / "deep", blobs, tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    names = ["m/a.safetensors", "m/deep/b.gguf", "m/config.json", "other.safetensors"]
    for name in names:
        (tmp_path / "models" / name).write_bytes(b"w")
    (blobs / "0123").write_bytes(b"w")
    (model / "link.safetensors").symlink_to("../blobs/0123")
    (model / "same.safetensors").hardlink_to(model / "a.safetensors")
    (tmp_path / "elsewhere" / "c.safetensors").write_bytes(b"w")
    mountpoint = str(tmp_path / "models")

    def named(*arguments: str, given: tuple[str, ...] = (), cwd: str = "/") -> list[str]:
        found = named_weights(arguments, [mountpoint], cwd=cwd, given=given)
        return sorted(os.path.relpath(path, tmp_path) for path in found)

    whole = ["models/m/a.safetensors", "models/m/deep/b.gguf", "models/m/link.safetensors"]
    assert named("server", str(model), "--port", "8000") == whole
    assert named(f"--model={model}") == whole
    assert named("m/deep", cwd=mountpoint) == ["models/m/deep/b.gguf"]
    assert named(str(model / "deep" / "b.gguf"), str(model / "config.json"), str(tmp_path / "none")) == [
        "models/m/deep/b.gguf"
    ]
    assert named(str(tmp_path / "elsewhere"), "--empty=") == [], "it is on no mount"
    assert named(given=(str(tmp_path / "elsewhere"),)) == ["elsewhere/c.safetensors"]
    assert named_weights([mountpoint], [], cwd="/") == []
    with pytest.raises(CheckpointError, match="not there"):
        named(given=(str(tmp_path / "none"),))
