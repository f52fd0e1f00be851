"""The options that say whether a snapshot is encrypted, and with which key."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import typer

from weightfs.errors import UsageError

if TYPE_CHECKING:
    from checkpoint.chunks.keys import MasterKey

KeyFile = Annotated[str | None, typer.Option(help="File with the 32 raw bytes of a key, mode 0600.")]
KeyEnv = Annotated[str | None, typer.Option(help="Variable that holds a key.")]
KeyCommand = Annotated[str | None, typer.Option(help="Command that prints a key.")]
NoEncrypt = Annotated[bool, typer.Option("--no-encrypt", help="Memory is stored as it is, passwords and all.")]


class Keys(NamedTuple):
    """What the options say; see `keyed`."""

    file: str | None
    env: str | None
    command: str | None
    no_encrypt: bool

    @property
    def names_one(self) -> bool:
        """Whether a key is named, or several."""
        return (self.file or self.env or self.command) is not None

    def master(self) -> MasterKey | None:
        """The key that one of the options names; None where nothing is encrypted.

        Raises:
            UsageError: not exactly one of them is given.
            MasterKeyError: there is no key where it says.
        """
        self.require_choice()
        return None if self.no_encrypt else one_key(self.file, self.env, self.command)

    def require_choice(self) -> None:
        """Scripts say from the start whether a snapshot is encrypted, and how.

        Raises:
            UsageError: not exactly one of the options is given.
        """
        given = [one for one in (self.file, self.env, self.command) if one is not None]
        if given and self.no_encrypt:
            raise UsageError("a key and --no-encrypt contradict each other")
        if len(given) > 1:
            raise UsageError("name one key: --key-file, --key-env or --key-command")
        if not given and not self.no_encrypt:
            raise UsageError(
                "say whether the snapshot is encrypted: --key-file, --key-env, --key-command or --no-encrypt"
            )


_OPTIONS: Final = {"key_file": KeyFile, "key_env": KeyEnv, "key_command": KeyCommand, "no_encrypt": NoEncrypt}


def keyed(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of this module, in place of its parameter `keys`, which gets what they say."""

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        keys = Keys(*(given.pop(name) for name in _OPTIONS))
        command(**given, keys=keys)

    known = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _OPTIONS.items()
    ]
    options[-1] = options[-1].replace(default=False)
    parameters: list[inspect.Parameter] = []
    for one in known.parameters.values():
        parameters += options if one.name == "keys" else [one.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    with_options.__signature__ = known.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_options


def one_key(key_file: str | None, key_env: str | None, key_command: str | None, *, prefix: str = "") -> MasterKey:
    """The key that one of the options names.

    Args:
        key_file, key_env, key_command: what the options say.
        prefix: of the options' names, for errors.

    Raises:
        UsageError: not exactly one of them is given.
        MasterKeyError: there is no key where it says.
    """
    if sum(one is not None for one in (key_file, key_env, key_command)) != 1:
        raise UsageError(f"name one key: --{prefix}key-file, --{prefix}key-env or --{prefix}key-command")
    from checkpoint.chunks import keys

    if key_file is not None:
        return keys.from_file(key_file)
    return keys.from_environment(key_env) if key_env is not None else keys.from_command(key_command or "")
