"""The shell of the command line: help, exit codes, errors as message and hint."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert 'Did you mean "edgekit optimize"?' in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["target", "list"], ["target", "list", "--json"]])
def test_reader_that_ends_early_is_no_failure(arguments):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        command = [sys.executable, "-m", "edgekit", *arguments]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_is_not_called_a_bug():
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "edgekit", "target", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_terminal_without_unicode_gets_an_answer():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "edgekit", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in {0, 1}
    assert "python" in done.stdout


def test_help_is_filled_to_the_width():
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "edgekit", "optimize", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    start = text.index("Every candidate")
    paragraph = [line for line in text[start:].partition("Arguments")[0].splitlines()[:-1] if line.strip()]
    assert min(len(line.rstrip()) for line in paragraph[:-1]) > 60


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


HEADERS = ["name", "value", "reason"]
ROWS = [["first", "1.2345", "it is slower than the other one in every run"], ["second", "2.3456", "no"]]


def narrow_table(monkeypatch, columns):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    return table(HEADERS, ROWS, right=[1]).splitlines()


def test_table_wraps_the_last_column_on_a_narrow_terminal(monkeypatch):
    lines = narrow_table(monkeypatch, 42)
    assert lines[1:] == [
        "first   1.2345  it is slower than the",
        "                other one in every run",
        "second  2.3456  no",
    ]


def test_table_takes_several_lines_where_no_text_fits_and_keeps_the_numbers(monkeypatch):
    lines = narrow_table(monkeypatch, 30)
    assert lines[2:4] == ["first   1.2345", "    it is slower than the"]
    assert lines[-2:] == ["second  2.3456", "    no"]
    assert max(len(line) for line in lines) <= 30


def test_progress_fits_the_terminal_when_stdout_goes_elsewhere():
    code = "from edgekit.cli.console import Progress; Progress().update('x' * 300, 0.5)"
    main, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    try:
        environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=terminal, check=True, env=environment)
        drawn = os.read(main, 4096).decode().rpartition("\x1b[K")[2]
    finally:
        os.close(terminal)
        os.close(main)
    assert 40 < len(drawn) < 60


@given(
    rows=st.lists(st.tuples(*[st.text("abc ", max_size=40)] * 2, st.floats(0, 1e6).map(str)), min_size=1, max_size=3),
    columns=st.integers(50, 120),
)
def test_table_never_exceeds_the_terminal(rows, columns):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: True)
        patch.setenv("NO_COLOR", "1")
        patch.setenv("COLUMNS", str(columns))
        text = table(["a", "b", "c"], rows, right=[2])
    assert all(len(line) <= columns for line in text.splitlines())
    assert all(row[2] in text for row in rows)


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
