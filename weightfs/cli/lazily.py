"""Groups of commands that import a command's module when it is asked for, and no other's.

Importing every command took the processor 0.25 s at each start, and pydantic, by which typer converts options from 0.29
on, 0.15 s more: `snapshot restore` may take 0.15 s over CRIU in all.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, ClassVar, Final

import typer
from typer.core import TyperCommand, TyperGroup

_REST: Final = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command that takes another one's command line."""


class LazyGroup(TyperGroup):
    """A group that knows its commands by name; `--help` and completion ask for all of them.

    Attributes:
        COMMANDS: where each command is, as `module:function`, in the order in which help lists them. Groups that were
            added to the typer come after them.
        WITH_REST: names of commands that take another one's command line.
    """

    COMMANDS: ClassVar[Mapping[str, str]] = {}
    WITH_REST: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, *, commands: Any = None, **attributes: Any) -> None:
        super().__init__(**attributes)
        for parameter in self.params:
            _spared(parameter)
        self.commands = _Commands(self.COMMANDS, self.WITH_REST, commands or {})

    def list_commands(self, ctx: Any) -> list[str]:
        """The names; nothing is imported for them."""
        del ctx
        return list(self.commands)

    def get_help_option(self, ctx: Any) -> Any:
        """`--help`."""
        return _spared(super().get_help_option(ctx))


class _Command(TyperCommand):
    def __init__(self, name: str | None, **attributes: Any) -> None:
        super().__init__(name, **attributes)
        for parameter in self.params:
            _spared(parameter)

    def get_help_option(self, ctx: Any) -> Any:
        return _spared(super().get_help_option(ctx))


class _Commands(MutableMapping[str, Any]):
    """Commands by name, made when they are looked up."""

    def __init__(self, places: Mapping[str, str], with_rest: frozenset[str], made: Mapping[str, Any]) -> None:
        self._places = places
        self._with_rest = with_rest
        self._made = dict(made)

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = _command(name, self._places[name], _REST if name in self._with_rest else None)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._places, **self._made})

    def __len__(self) -> int:
        return len({**self._places, **self._made})


def _command(name: str, place: str, settings: dict[str, Any] | None) -> Any:
    """What typer makes of one function."""
    module, _, function = place.partition(":")
    alone = typer.Typer(add_completion=False)
    callback = getattr(importlib.import_module(module), function)
    alone.command(name, cls=_Command, context_settings=settings)(callback)
    return typer.main.get_command(alone)


def _spared(parameter: Any) -> Any:
    """Have an option or argument pass a value on that is what it is to be: typer would import pydantic to find out."""
    described = getattr(parameter, "type_descriptor", None)
    if described is None or "process_value" in vars(parameter) or described.parameter_info.parser is not None:
        return parameter  # an older typer, which needs no pydantic; or it is spared already; or there is more to do
    wanted, convert = described.annotation, parameter.process_value
    takes_many = parameter.multiple or parameter.nargs != 1

    def process_value(context: Any, value: Any) -> Any:
        if value is None and not parameter.required:
            value = () if takes_many else None
        elif wanted is float and type(value) is str and value.isascii() and value.isdigit():
            value = float(value)
        elif wanted not in (str, float, bool) or type(value) is not wanted or described.is_ranged:
            return convert(context, value)
        return value if parameter.callback is None else parameter.callback(context, parameter, value)

    parameter.process_value = process_value
    return parameter
