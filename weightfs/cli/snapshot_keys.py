"""The options that say whether a snapshot is encrypted, and with which key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weightfs.errors import UsageError

if TYPE_CHECKING:
    from checkpoint.chunks.keys import MasterKey

KeyFile = Annotated[str | None, typer.Option(help="File with the 32 raw bytes of a key, mode 0600.")]
KeyEnv = Annotated[str | None, typer.Option(help="Variable that holds a key.")]
KeyCommand = Annotated[str | None, typer.Option(help="Command that prints a key.")]
NoEncrypt = Annotated[bool, typer.Option("--no-encrypt", help="Memory is stored as it is, passwords and all.")]


def master_key(
    key_file: str | None, key_env: str | None, key_command: str | None, *, no_encrypt: bool
) -> MasterKey | None:
    """The key that one of the options names; None where nothing is encrypted.

    Raises:
        UsageError: not exactly one of them is given.
        MasterKeyError: there is no key where it says.
    """
    require_choice(key_file, key_env, key_command, no_encrypt=no_encrypt)
    return None if no_encrypt else one_key(key_file, key_env, key_command)


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


def require_choice(key_file: str | None, key_env: str | None, key_command: str | None, *, no_encrypt: bool) -> None:
    """Scripts say from the start whether a snapshot is encrypted, and how.

    Raises:
        UsageError: not exactly one of the options is given.
    """
    given = [one for one in (key_file, key_env, key_command) if one is not None]
    if given and no_encrypt:
        raise UsageError("a key and --no-encrypt contradict each other")
    if len(given) > 1:
        raise UsageError("name one key: --key-file, --key-env or --key-command")
    if not given and not no_encrypt:
        raise UsageError("say whether the snapshot is encrypted: --key-file, --key-env, --key-command or --no-encrypt")
