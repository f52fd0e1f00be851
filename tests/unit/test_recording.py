"""What `weightfs record` makes of a command."""

from __future__ import annotations

import pytest

from weightfs.cli.recording import family_of, replaced
from weightfs.errors import UsageError


@pytest.mark.parametrize(
    ("path", "argument", "made"),
    [
        ("/m/llama", "{}", "/tmp/x"),
        ("/m/llama", "/m/llama", "/tmp/x"),
        ("/m/llama/", "/m/llama", "/tmp/x"),
        ("/m/llama", "/m/llama/config.json", "/tmp/x/config.json"),
        ("/m/llama", "--model=/m/llama", "--model=/tmp/x"),
        ("/m/llama", "load('/m/llama/a', {})", "load('/tmp/x/a', {})"),
        ("llama", "llama/model.safetensors", "/tmp/x/model.safetensors"),
    ],
)
def test_the_models_path_is_replaced(path: str, argument: str, made: str) -> None:
    assert replaced(["run", argument], path, "/tmp/x") == ["run", made]


@pytest.mark.parametrize("argument", ["/m/llama2", "/m/llama-7b/a", "/srv/m/llama", "dict = {}", "llama"])
def test_another_name_is_not(argument: str) -> None:
    with pytest.raises(UsageError, match="does not name the model"):
        replaced(["run", argument], "/m/llama", "/tmp/x")


@pytest.mark.parametrize(
    ("command", "family"),
    [
        (["python", "-c", "from transformers import AutoModel"], "transformers"),
        (["/opt/llama.cpp/bin/server", "-m", "x.gguf"], "llama.cpp"),
        (["/usr/bin/loader", "x"], "loader"),
    ],
)
def test_the_family_of_a_loader(command: list[str], family: str) -> None:
    assert family_of(command) == family
