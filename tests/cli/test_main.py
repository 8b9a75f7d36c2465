"""The shell of the command line: help, exit codes, errors as message and hint."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgekit.cli import main as cli_main
from edgekit.cli.console import format_bytes, format_seconds, table
from edgekit.errors import DataError, OperationError, TrustError, UsageError


def edgekit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgekit", *arguments], capture_output=True, text=True, check=False)


def test_help_names_every_command():
    done = edgekit("--help")
    assert done.returncode == 0
    for name in cli_main.COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", list(cli_main.COMMANDS))
def test_command_help_reads(name):
    done = edgekit(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: edgekit" in done.stdout


def test_unknown_command_is_a_usage_error():
    done = edgekit("optimise")
    assert done.returncode == 2
    assert "optimise" in done.stderr


def test_version_prints():
    assert edgekit("--version").stdout.startswith("edgekit ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x.y", "bad argument", hint="give another"), 2),
        (DataError("x.y", "bad data"), 2),
        (OperationError("x.y", "failed"), 3),
        (TrustError("x.y", "refused"), 4),
        (RuntimeError("boom"), 70),
        (KeyboardInterrupt(), 130),
    ],
)
def test_error_maps_to_exit_code(monkeypatch, capsys, error, code):
    def fail(*_arguments, **_named):
        raise error

    monkeypatch.setattr(cli_main, "app", fail)
    assert cli_main.main([]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(error) in captured.err
    if isinstance(error, UsageError) and error.hint:
        assert "hint: give another" in captured.err


def test_table_aligns_numbers():
    assert table(["name", "ms"], [["fp32", "1.25"], ["int8", "0.5"]], right=[1]).splitlines()[2] == "int8   0.5"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (2_000_000, "2.00 MB"), (3e9, "3.00 GB")]
)
def test_bytes_read_well(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.84, "0.8 s"), (42.2, "42 s"), (185, "3 min 05 s")])
def test_seconds_read_well(seconds, text):
    assert format_seconds(seconds) == text
