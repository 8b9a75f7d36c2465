"""A device's commands without typer: the same functions, over argparse."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgekit.cli import agent, doctor, target

WITHOUT = "import sys; sys.modules['typer'] = None; from edgekit.cli.entry import run; run()"


def edgekit(*arguments, code=0):
    done = subprocess.run([sys.executable, "-c", WITHOUT, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def options_of(command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts) if name[:2] == "--"}


@pytest.mark.parametrize(("noun", "module"), [("agent", agent), ("target", target)])
def test_every_command_takes_what_it_takes_with_typer(noun, module):
    import typer

    group = typer.main.get_command(module.app)
    for name, command in group.commands.items():
        shown = edgekit(noun, name, "--help").stdout
        missing = {
            option for option in options_of(command) - {"--help"} if option not in shown and not is_hidden(command, option)
        }
        assert not missing, (name, missing)


def is_hidden(command, option: str) -> bool:
    return any(getattr(each, "hidden", False) and option in each.opts for each in command.params)


def test_single_command_needs_no_name():
    assert doctor.app
    assert "Python" in edgekit("doctor", "--for", "agent").stdout


def test_values_and_exit_codes(tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    (state / "agent.log").write_text("".join(f"line={number}\n" for number in range(9)))
    assert edgekit("agent", "logs", "-n", "2", "--state-dir", state).stdout == "line=7\nline=8\n"
    assert "invalid" in edgekit("agent", "logs", "-n", "-1", "--state-dir", state, code=2).stderr
    assert "invalid choice" in edgekit("agent", "nothing", code=2).stderr
    assert "no agent runs" in edgekit("agent", "rollback", "model", "--state-dir", state, code=3).stderr
    assert "expected a time" in edgekit("agent", "pause", "--for", "soon", "--state-dir", state, code=2).stderr
    assert edgekit("agent", "doctor", "--offline", "--json", "--state-dir", state, code=1).stdout.startswith("{")


def test_what_needs_typer_says_so():
    assert "edgekit[cli]" in edgekit("optimize", code=3).stderr
    assert edgekit("--version").stdout.startswith("edgekit ")
    assert "agent" in edgekit().stdout
