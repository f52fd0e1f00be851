"""As much of vLLM 0.33.0 as a model loader meets, for machines without it.

Read from `vllm/model_executor/model_loader/__init__.py`, `base_loader.py`, `default_loader.py` and `config/load.py` of
that version's wheel. Left out is what needs vLLM's engine: the platform, quantisation, logging.
"""

from __future__ import annotations

import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class LoadConfig:
    load_format: str = "auto"
    download_dir: str | None = None
    model_loader_extra_config: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    ignore_patterns: list[str] | str = field(default_factory=lambda: ["original/**/*"])


@dataclass
class ModelConfig:
    model: str
    revision: str | None = None
    model_weights: str = ""
    quantization: str | None = None
    dtype: torch.dtype = torch.float32
    make: Callable[[], nn.Module] | None = None


@dataclass
class Source:
    """`DefaultModelLoader.Source`."""

    model_or_path: str
    revision: str | None
    subfolder: str | None = None
    prefix: str = ""
    fall_back_to_pt: bool = True
    allow_patterns_overrides: list[str] | None = None
    is_unused_weight: Callable[[str], bool] | None = None


class BaseModelLoader(ABC):
    def __init__(self, load_config: LoadConfig) -> None:
        self.load_config = load_config

    @abstractmethod
    def download_model(self, model_config: ModelConfig) -> None:
        raise NotImplementedError

    @abstractmethod
    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        raise NotImplementedError

    def load_model(self, vllm_config: Any, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        assert model_config.make is not None
        device = torch.device(self.load_config.device or "cpu")
        before = torch.get_default_dtype()
        torch.set_default_dtype(model_config.dtype)
        try:
            with device:
                model = model_config.make()
            self.load_weights(model, model_config)
        finally:
            torch.set_default_dtype(before)
        return model.eval()


_LOAD_FORMAT_TO_MODEL_LOADER: dict[str, type[BaseModelLoader]] = {}
registered: list[str] = []
"""Every registration, in order: a second one of a name is a warning in vLLM."""
downloads: list[tuple[Any, ...]] = []
"""What was downloaded; a test sets `download_folder` to where it is to have come to."""
download_folder: list[str] = []


def register_model_loader(load_format: str) -> Callable[[type[BaseModelLoader]], type[BaseModelLoader]]:
    def wrapper(model_loader_cls: type[BaseModelLoader]) -> type[BaseModelLoader]:
        if not issubclass(model_loader_cls, BaseModelLoader):
            raise ValueError("The model loader must be a subclass of `BaseModelLoader`.")
        _LOAD_FORMAT_TO_MODEL_LOADER[load_format] = model_loader_cls
        registered.append(load_format)
        return model_loader_cls

    return wrapper


def get_model_loader(load_config: LoadConfig) -> BaseModelLoader:
    load_format = load_config.load_format
    if load_format not in _LOAD_FORMAT_TO_MODEL_LOADER:
        raise ValueError(f"Load format `{load_format}` is not supported")
    return _LOAD_FORMAT_TO_MODEL_LOADER[load_format](load_config)


def download_weights_from_hf(
    model_name_or_path: str,
    cache_dir: str | None,
    allow_patterns: list[str],
    revision: str | None = None,
    subfolder: str | None = None,
    ignore_patterns: str | list[str] | None = None,
) -> str:
    downloads.append((model_name_or_path, cache_dir, allow_patterns, revision, subfolder, ignore_patterns))
    return download_folder[0]


def modules() -> dict[str, types.ModuleType]:
    """The double under vLLM's names, for `sys.modules`."""
    here = sys.modules[__name__]
    found = {}
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader"):
        found[name] = types.ModuleType(name)
        found[name].__path__ = []
    loader: Any = found["vllm.model_executor.model_loader"]
    loader.register_model_loader, loader.get_model_loader = register_model_loader, get_model_loader
    for name in ("base_loader", "weight_utils"):
        found[f"{loader.__name__}.{name}"] = here
    return found
