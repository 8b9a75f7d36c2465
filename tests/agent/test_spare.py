"""A worker that is started in advance: used when it is there, missed by nobody when it is not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from edgekit.agent import spare
from tests.agent.world import wait_for


@pytest.fixture
def installed(tmp_path):
    """What a state folder looks like from outside."""
    (tmp_path / "state.json").write_text(json.dumps({"active": "a", "slots": [{"name": "a", "variant": "v0"}]}))
    folder = tmp_path / "slots" / "a"
    folder.mkdir(parents=True)
    variant = {"name": "v0", "requires": {"runtime": "onnxruntime"}}
    (folder / "manifest.json").write_text(json.dumps({"variants": [variant]}))
    return tmp_path


def test_guess_of_the_runtime(installed, tmp_path):
    assert spare.runtime_in_use(installed) == "onnxruntime"
    (installed / "state.json").write_text('{"active": null, "slots": []}')
    assert spare.runtime_in_use(installed) == ""
    assert spare.start_spare(installed) is None
    assert spare.start_spare(tmp_path / "none") is None


def test_spare_that_nobody_wants_ends(installed):
    pid, descriptor = spare.start_spare(installed)
    spare.keep(pid, descriptor)

    async def run() -> int:
        return await (await spare.release()).wait()

    assert asyncio.run(run()) == 0
    assert spare.take() is None


def test_spare_that_died_is_missed_by_nobody(installed):
    pid, descriptor = spare.start_spare(installed)
    spare.keep(pid, descriptor)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z", what="its end")

    async def run() -> object:
        process = spare.hand_over(spare.take(), ("--link", "{0}"), (0,))
        return process if process is None else await process.wait()

    assert asyncio.run(run()) in {None, -signal.SIGKILL}


def test_agent_that_has_a_model_starts_with_a_spare(world, make_agent):
    agent = make_agent().start()
    world.publish("1.0", seed=1)
    agent.wait_served("1.0")
    agent.wait_committed("1.0")
    agent.stop()
    agent.start().wait_served("1.0")
    (worker,) = agent.worker_pids()
    assert b"--spare" in Path(f"/proc/{worker}/cmdline").read_bytes()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: agent.worker_pids() not in ([], [worker]), what="the next worker")
    agent.wait_served("1.0")
    assert agent.logged("code=worker.crashed")
    assert agent.stop() == 0
