"""vLLM's `--load-format weightfs`: tensors come to the model on its device, through pinned memory, layer by layer.

Registered by the entry point `weightfs` of the group `vllm.general_plugins`, which vLLM calls in each of its processes.
Written against vLLM 0.33.0 (`vllm/model_executor/model_loader/base_loader.py`): a loader is a `BaseModelLoader` with
`download_model` and `load_weights`, and a model takes an iterator of names and tensors. What vLLM's own loader takes
from a model (`secondary_weights`, `allow_patterns_overrides`, `is_unused_checkpoint_weight`) is taken here, too.

While a model takes one window of tensors the next is read, so the device needs room for two of `ARENA_BYTES` beside the
model. Only safetensors are loaded.
"""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch import nn

from weightfs.errors import UsageError, WeightfsError
from weightfs.torch.asking import ask_for
from weightfs.torch.files import WeightFile, by_name, find_files, stored
from weightfs.torch.loader import in_order, load_stored
from weightfs.torch.memory import arenas

LOAD_FORMAT: Final = "weightfs"
_PATTERNS: Final = ["*.safetensors"]
_INDEX: Final = "*.safetensors.index.json"

Weights = Iterator[tuple[str, torch.Tensor]]


def register() -> None:
    """Tell vLLM of the load format; any number of times."""
    _loader()


@functools.cache
def _loader() -> Any:
    """The loader's class. Made here, since vLLM takes seconds to import and may not be there."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(LOAD_FORMAT)
    class WeightfsModelLoader(BaseModelLoader):  # type: ignore[misc]
        """Loads safetensors by weightfs.torch.

        Raises:
            UsageError: `model_loader_extra_config` holds anything: there are no options.
        """

        def __init__(self, load_config: Any) -> None:
            super().__init__(load_config)
            if extra := load_config.model_loader_extra_config:
                raise UsageError(f"load format {LOAD_FORMAT} knows no extra options: {extra}")

        def download_model(self, model_config: Any) -> None:
            """Have the files of a model that is named by its repository."""
            _folder(_name_of(model_config), model_config.revision, None, _PATTERNS, self.load_config)

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            """Load into a model that is there."""
            loaded = model.load_weights(_all_weights(model, model_config, self.load_config))
            if loaded is not None and model_config.quantization is None:
                _refuse_unfilled(model, loaded)

    return WeightfsModelLoader


def _name_of(model_config: Any) -> str:
    """The folder or repository that the weights are in."""
    return str(getattr(model_config, "model_weights", None) or model_config.model)


def _all_weights(model: nn.Module, model_config: Any, load_config: Any) -> Weights:
    device = _device_of(model, load_config)
    patterns = getattr(model, "allow_patterns_overrides", None)
    files = _files(_name_of(model_config), model_config.revision, None, patterns, load_config)
    yield from weights(files, device, skip=getattr(model, "is_unused_checkpoint_weight", None))
    for source in getattr(model, "secondary_weights", ()):
        subfolder = getattr(source, "subfolder", None)
        files = _files(source.model_or_path, source.revision, subfolder, source.allow_patterns_overrides, load_config)
        for name, tensor in weights(files, device, skip=getattr(source, "is_unused_weight", None)):
            yield source.prefix + name, tensor


def _files(
    model: str, revision: str | None, subfolder: str | None, patterns: Sequence[str] | None, load_config: Any
) -> list[str]:
    folder = _folder(model, revision, subfolder, patterns or _PATTERNS, load_config)
    if patterns is None:
        return find_files(folder)
    found = next((names for each in patterns if (names := sorted(glob.glob(os.path.join(folder, each))))), [])
    if not found or not all(name.endswith(".safetensors") for name in found):
        raise WeightfsError(f"holds no safetensors named {' or '.join(patterns)}", path=folder)
    return found


def _folder(model: str, revision: str | None, subfolder: str | None, patterns: Sequence[str], load_config: Any) -> str:
    folder = model
    if not os.path.isdir(model):
        from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

        folder = download_weights_from_hf(
            model,
            load_config.download_dir,
            [*patterns],
            revision,
            subfolder=subfolder,
            ignore_patterns=load_config.ignore_patterns,
        )
        # Of a repository with weights in two forms only those that the index names are the model.
        download_weights_from_hf(model, load_config.download_dir, [_INDEX], revision, subfolder=subfolder)
    return folder if subfolder is None else os.path.join(folder, subfolder)


def _device_of(model: nn.Module, load_config: Any) -> torch.device:
    """Where the model's weights are: that of most of them which are on an accelerator, if any are."""
    if load_config.device is not None:
        return torch.device(load_config.device)
    sizes: dict[torch.device, int] = {}
    for one in model.parameters():
        if not one.is_meta:
            sizes[one.device] = sizes.get(one.device, 0) + one.nbytes
    on_accelerators = {device: nbytes for device, nbytes in sizes.items() if device.type != "cpu"}
    if on_accelerators:
        return max(on_accelerators, key=lambda device: on_accelerators[device])
    if sizes or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def weights(names: Sequence[str], device: torch.device, *, skip: Callable[[str], bool] | None = None) -> Weights:
    """Every tensor of these files, on a device, in the order in which a model needs them.

    Args:
        names: weight files that form one model.
        device: where the tensors are to be.
        skip: names for which it says yes are not read.

    Raises:
        FormatError: a header does not describe its file, or two files have a tensor of one name.
        OSError: a file can't be opened or read.
    """
    ask_for(names)
    with ExitStack() as stack:
        files = [stack.enter_context(WeightFile(name)) for name in names]
        wanted = [stored(file, name) for name, file in by_name(files).items() if skip is None or not skip(name)]
        wanted = [wanted[number] for number in in_order(wanted)]
        windows = [wanted[run] for run in arenas([one.nbytes for one in wanted])]
        pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="weightfs-next"))
        coming: Future[list[torch.Tensor]] | None = None
        for number, window in enumerate(windows):
            here = coming.result() if coming is not None else load_stored(window, device)
            following = windows[number + 1] if number + 1 < len(windows) else None
            coming = pool.submit(load_stored, following, device) if following is not None else None
            for one in window:
                # Given away: a window's memory is free again once the model has taken the last of it.
                yield one.extent.name, here.pop(0)


def _refuse_unfilled(model: nn.Module, loaded: set[str]) -> None:
    """As vLLM's own loader: what is not quantised must come from the files, or be made from what does."""
    made = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if (method := getattr(module, "quant_method", None)) is not None
        if getattr(method, "uses_meta_device", False) or getattr(method, "process_weights_after_loading", None)
        for name, _ in module.named_parameters()
    }
    if absent := {name for name, _ in model.named_parameters()} - loaded - made:
        raise ValueError(f"Following weights were not initialized from checkpoint: {absent}")
