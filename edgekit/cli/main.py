"""The entry point: commands are loaded when they are called, errors become a message, a hint and an exit code.

Exit codes: 0 done; 1 the answer is no; 2 usage or configuration; 3 operation failed; 4 trust failed; 70 our bug;
130 interrupted.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import io
import os
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from edgekit import __version__
from edgekit.cli.console import note, paint
from edgekit.errors import EdgekitError, EnvironmentFault, UsageError

EXIT_BUG = 70
EXIT_INTERRUPTED = 130
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("edgekit.cli.demo", "See the whole way once: optimize, publish, three agents, dashboard."),
    "optimize": ("edgekit.cli.optimize", "Find the fastest form of a model that meets a budget on a target."),
    "explain": ("edgekit.cli.explain", "Show how a candidate came to be, and make it again bit for bit."),
    "benchmark": ("edgekit.cli.benchmark", "Time models against each other, interleaved, with the noise stated."),
    "inspect": ("edgekit.cli.inspect", "Show what the runtime really runs for a model, and what it costs."),
    "features": ("edgekit.cli.features", "Declared features: compute them, prove that a stream gives the same."),
    "predict": ("edgekit.cli.predict", "Run a model file or a bundle on data."),
    "target": ("edgekit.cli.target", "Target profiles: list, show, check, probe this machine."),
    "bundle": ("edgekit.cli.bundle", "Pack, verify and inspect signed bundles."),
    "repo": ("edgekit.cli.repo", "The update repository: init, publish, status, serve."),
    "trust": ("edgekit.cli.trust", "Who may sign what: init, status, sign, rotate, revoke, delegate, doctor."),
    "agent": ("edgekit.cli.agent", "The on-device agent: run it, ask it."),
    "fleet": ("edgekit.cli.fleet", "The fleet server: serve it, list devices, command them."),
    "monitor": ("edgekit.cli.monitor", "Watch data: replay a recording against a baseline, with an alarm budget."),
    "recalibrate": ("edgekit.cli.recalibrate", "From drift in the field to a better release, and a canary of it."),
    "doctor": ("edgekit.cli.doctor", "Check this machine: packages, runtimes, ports, permissions."),
}

_MACHINE_HINT = "Check free space and permissions."


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are asked for, so that ``--help`` stays fast."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the base class's signature
        """The commands' names, in the order of the way."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Load one command; for the group's own ``--help`` only its one-line summary is made."""
        if cmd_name not in COMMANDS:
            return None
        module, summary = COMMANDS[cmd_name]
        if ctx.meta.get("edgekit.summaries"):
            stub = typer.Typer(help=summary, add_completion=False)
            stub.command(name=cmd_name, help=summary)(lambda: None)
            command = typer.main.get_command(stub)
            command.name = cmd_name
            return command
        command = typer.main.get_command(importlib.import_module(module).app)
        command.name = cmd_name
        for each in (command, *getattr(command, "commands", {}).values()):
            each.help = _join_lines(each.help)
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or name the nearest one."""
        near = difflib.get_close_matches(args[0], COMMANDS, n=1) if args and args[0] not in COMMANDS else []
        if near and not args[0].startswith("-"):
            raise UsageError("command.unknown", f"{args[0]}: no such command.", hint=f'Did you mean "edgekit {near[0]}"?')
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the group's help from the summaries."""
        ctx.meta["edgekit.summaries"] = True
        super().format_help(ctx, formatter)


def _join_lines(text: str | None) -> str | None:
    """Paragraphs without the source's line breaks, so that the help is filled to the terminal's width."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n")) if text else text


app = typer.Typer(
    cls=LazyGroup,
    name="edgekit",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"edgekit {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """From a trained model to a fleet you can trust.

    Optimize a model for a device, prove it, pack it signed, deliver it over the air, serve it, watch it.
    """


def _report(error: EdgekitError) -> int:
    note(f"{paint('error:', 'red', 'bold', stream=sys.stderr)} {error.message}")
    if error.hint:
        note(f"{paint('hint:', 'cyan', stream=sys.stderr)} {error.hint}")
    if os.environ.get("EDGEKIT_DEBUG"):
        traceback.print_exception(error)
    return error.exit_code


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        result = app(arguments, standalone_mode=False, prog_name="edgekit")
        sys.stdout.flush()
    except EdgekitError as error:
        return _report(error)
    except KeyboardInterrupt:
        note("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return _drop_output(0)
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _drop_output(0)  # the reader has enough, for example "| head"; the framework would call that a failure
    except Exception as error:  # noqa: BLE001 - the last line of defence: a bug becomes exit 70, with its trace
        return _foreign(error)
    return result if isinstance(result, int) else 0


def _foreign(error: Exception) -> int:
    """Click's own errors keep their format and code; anything else is our bug."""
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        error.show()
        return int(error.exit_code)
    if type(error).__name__ == "Abort":
        note("interrupted")
        return EXIT_INTERRUPTED
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
        what = error.filename or "the output"
        return _drop_output(_report(EnvironmentFault("file.unwritable", f"{what}: {error.strerror}.", hint=_MACHINE_HINT)))
    traceback.print_exception(error)
    note(f"this is a bug in edgekit {__version__}: {type(error).__name__}: {error}", "red")
    note("please report it with the trace above")
    return EXIT_BUG


def _drop_output(code: int) -> int:
    """Forget what stdout still holds: nobody can take it, and the interpreter would fail over it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def run() -> None:
    """Console-script entry point."""
    sys.exit(main())
