"""The part of typer that a device's commands use, over argparse: for installations without typer.

On a device typer and what it brings (rich, pygments, pydantic) take 24 MB of disk, more than everything else of edgekit. So an
agent's installation does without, and where typer is absent this module takes its name. The commands are the same functions:
what they declare with ``typer.Option`` and ``typer.Argument`` is what argparse is told.

    >>> app = Typer(help="Greets.")
    >>> @app.command()
    ... def greet(name: str = Argument(..., help="Whom.")) -> None:
    ...     print("hello", name)
    >>> app(["edge"])
    hello edge
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekit.errors import EnvironmentFault

Command = Callable[..., Any]


class Exit(Exception):  # noqa: N818 - typer's name
    """End with an exit code."""

    def __init__(self, code: int = 0) -> None:
        super().__init__(code)
        self.exit_code = code


class TyperGroup:
    """What groups with ways of their own are built on; they are not run without typer."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """An option or an argument, as it was declared."""

    default: Any
    names: tuple[str, ...] = ()
    is_argument: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is ...


def Option(default: Any = ..., *names: str, **more: Any) -> Any:  # noqa: N802 - typer's name
    """Declare an option."""
    return Parameter(default=default, names=names, more=more)


def Argument(default: Any = ..., **more: Any) -> Any:  # noqa: N802 - typer's name
    """Declare an argument."""
    return Parameter(default=default, is_argument=True, more=more)


class Typer:
    """Commands; one alone needs no name."""

    def __init__(self, *, help: str = "", cls: type | None = None, name: str = "", **_more: Any) -> None:  # noqa: A002 - typer's
        self.help, self.name = help, name
        self.is_special = cls is not None
        self.commands: dict[str, Command] = {}
        self.root: Command | None = None

    def command(self, name: str = "", **_more: Any) -> Callable[[Command], Command]:
        """Add a function."""

        def add(function: Command) -> Command:
            self.commands[name or function.__name__.replace("_", "-")] = function
            return function

        return add

    def callback(self, **_more: Any) -> Callable[[Command], Command]:
        """Keep the function that the whole group has."""

        def keep(function: Command) -> Command:
            self.root = function
            return function

        return keep

    def __call__(self, arguments: Sequence[str] | None = None, *, prog_name: str = "", **_more: Any) -> Any:
        """Run a command; what it returns, or the code that it ended with."""
        words = list(sys.argv[1:] if arguments is None else arguments)
        try:
            return _run_root(words, prog_name) if self.name == "edgekit" else self.run(words, prog_name)
        except Exit as end:
            return end.exit_code

    def run(self, words: list[str], prog: str) -> Any:
        """Run the command that the words name; what it returns."""
        parser = argparse.ArgumentParser(prog=prog or None, description=self.help or None, allow_abbrev=False)
        if len(self.commands) == 1:
            (function,) = self.commands.values()
            _describe(parser, function)
        else:
            choices = parser.add_subparsers(metavar="COMMAND", required=True)
            for name, function in self.commands.items():
                text = inspect.getdoc(function) or ""
                child = choices.add_parser(name, help=_escape(text.partition("\n")[0]), allow_abbrev=False)
                _describe(child, function)
        given = vars(parser.parse_args(words))
        function = given.pop("__function__")
        return function(**given)


def _run_root(words: list[str], prog: str) -> Any:
    """``edgekit``: its nouns, each loaded when it is asked for."""
    main = importlib.import_module("edgekit.cli.main")
    if words[:1] == ["--version"]:
        sys.stdout.write(f"edgekit {main.__version__}\n")
        return 0
    runnable = {name: summary for name, (_, summary) in main.COMMANDS.items() if name in DEVICE_NOUNS}
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False, epilog=f"The other commands: {_INSTALL}")
    parser.add_argument("--version", action="store_true", help="Print the version.")
    parser.add_argument("noun", choices=list(main.COMMANDS), metavar="COMMAND", help=", ".join(runnable))
    if not words or words[0].startswith("-"):
        parser.parse_args(words or ["--help"])
    parser.parse_args(words[:1])
    module = importlib.import_module(main.COMMANDS[words[0]][0])
    app: Typer = module.app
    if app.is_special or app.root is not None or words[0] not in DEVICE_NOUNS:
        raise EnvironmentFault("package.missing", f"edgekit {words[0]} needs the package typer.", hint=_INSTALL)
    return app.run(words[1:], f"{prog} {words[0]}")


DEVICE_NOUNS = ("agent", "target", "doctor")
"""What an agent's installation runs."""
_INSTALL = "pip install 'edgekit[cli]'"


def _describe(parser: argparse.ArgumentParser, function: Command) -> None:
    """Tell argparse what a function takes."""
    parser.description = _escape(inspect.getdoc(function) or "")
    parser.set_defaults(__function__=function)
    hints = typing.get_type_hints(function)
    for name, each in inspect.signature(function).parameters.items():
        assert isinstance(each.default, Parameter), name
        _add(parser, name, each.default, hints[name])


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """The type of one value, and whether it is a list."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return _unwrap(kinds[0])
    return (kinds[0], True) if typing.get_origin(hint) is list else (hint, False)


def _add(parser: argparse.ArgumentParser, name: str, declared: Parameter, hint: Any) -> None:
    kind, is_list = _unwrap(hint)
    more = declared.more
    text = argparse.SUPPRESS if more.get("hidden") else _help(declared)
    default = None if declared.is_required else declared.default
    if kind is bool:
        positive = [part.split("/")[0] for part in declared.names] or [f"--{name.replace('_', '-')}"]
        parser.add_argument(*positive, dest=name, action="store_true", default=default, help=text)
        if negative := [part.split("/")[1] for part in declared.names if "/" in part]:
            parser.add_argument(*negative, dest=name, action="store_false", default=default, help=argparse.SUPPRESS)
        return
    settings: dict[str, Any] = {"type": _checked(kind, more.get("min"), more.get("max")), "help": text, "default": default}
    if metavar := more.get("metavar"):
        settings["metavar"] = metavar.strip("[].")
    if declared.is_argument:
        settings["nargs"] = "*" if is_list else None if declared.is_required else "?"
        parser.add_argument(name, **settings)
        return
    action = {"action": "append", "default": default or None} if is_list else {}
    names = declared.names or (f"--{name.replace('_', '-')}",)
    parser.add_argument(*names, dest=name, required=declared.is_required, **(settings | action))


def _help(declared: Parameter) -> str:
    text, default = str(declared.more.get("help", "")), declared.default
    shown = declared.more.get("show_default")
    if isinstance(shown, str):
        text += f"  [default: ({shown})]"
    elif isinstance(default, str | int | float) and not isinstance(default, bool) and default != "":
        text += f"  [default: {default}]"
    return _escape(text)


def _escape(text: str) -> str:
    """For argparse, which expands percent signs."""
    return text.replace("%", "%%")


def _checked(kind: Any, least: float | None, most: float | None) -> Callable[[str], Any]:
    """A value of a type within its bounds."""

    def read(text: str) -> Any:
        value = kind(text)
        if (least is not None and value < least) or (most is not None and value > most):
            raise ValueError(text)
        return value

    read.__name__ = getattr(kind, "__name__", "value")
    return read


def stand_in() -> None:
    """Take typer's name, for the commands that import it."""
    here = sys.modules[__name__]
    core = types.ModuleType("typer.core")
    core.TyperGroup = TyperGroup  # type: ignore[attr-defined]
    sys.modules["typer"], sys.modules["typer.core"] = here, core
