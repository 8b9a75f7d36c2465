"""``edgekit agent`` on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from edgekit.cli import agent_process
from edgekit.cli.main import main
from edgekit.schema.base import encode_json
from edgekit.schema.state import AgentState, Slot
from tests.agent.world import Agent, free_port, wait_for


def edgekit(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "edgekit", "agent", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("EDGEKIT_AGENT_")} | {"NO_COLOR": "1"},
    )


@pytest.fixture
def agent(tmp_path):
    made = Agent(tmp_path).start()
    wait_for(lambda: made.get("/v2/health/live")[0] == 200)
    yield made
    made.stop()


def test_status_of_a_running_agent(agent):
    done = edgekit("status", "--state-dir", str(agent.state_dir))
    assert done.returncode == 0, done.stderr
    assert "cam (lab)" in done.stdout
    assert "broker not connected" in done.stdout
    record = json.loads(edgekit("status", "--url", f"http://127.0.0.1:{agent.port}", "--json").stdout)
    assert record["pid"] == agent.process.pid
    assert record["state"]["device"] == "cam"
    by_config = json.loads(edgekit("status", "--config", str(agent.config), "--json").stdout)
    assert by_config["url"] == record["url"]


def test_status_of_a_stopped_agent_is_its_state_on_disk(tmp_path):
    state = AgentState(
        device="cam", slots=(Slot(name="a", status="active", model="kws", version="1.0", counter=3), Slot(name="b"))
    )
    (tmp_path / "state.json").write_bytes(encode_json(state))
    done = edgekit("status", "--state-dir", str(tmp_path))
    assert done.returncode == 1
    assert "kws@1.0" in done.stdout
    assert "does not run" in done.stderr


def test_status_without_any_agent(tmp_path):
    done = edgekit("status", "--state-dir", str(tmp_path))
    assert done.returncode == 3
    assert "state.json" in done.stderr
    done = edgekit("status", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 3
    assert "hint:" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--broker", "mqtt://example.com"], "plain mqtt"),
        (["--repository", "http://127.0.0.1:1", "--model", "m"], "--root"),
        (["--repository", "http://127.0.0.1:1", "--model", "m", "--root", "none.json"], "none.json"),
        (["--label", "x"], "NAME=VALUE"),
        (["--config", "none.toml"], "none.toml"),
        (["--port", "99999"], "port"),
    ],
)
def test_wrong_usage_is_exit_2_with_the_reason(tmp_path, arguments, words):
    done = edgekit("run", "--state-dir", str(tmp_path / "s"), *arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "s").exists()


def test_agent_without_a_repository_says_that_nothing_will_come(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(agent_process, "become_agent", started.append)
    assert main(["agent", "run", "--state-dir", str(tmp_path)]) == 0
    assert "no --repository" in capsys.readouterr().err
    assert len(started) == 1
