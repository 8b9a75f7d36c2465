"""A standard client of the protocol works unchanged: Triton's own, over HTTP, in an environment of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.agent.world import build_model

ROOT = Path(__file__).parents[2]
PEERS = Path(os.environ.get("EDGEKIT_VENV", ROOT / ".venv")) / "peers"
PYTHON = PEERS / "tritonclient" / "bin" / "python"
REASON = PEERS / "tritonclient.missing"


@pytest.mark.skipif(
    not PYTHON.is_file(),
    reason=REASON.read_text().strip() if REASON.is_file() else "scripts/peer-tools tritonclient was not run",
)
def test_tritonclient_works_unchanged_and_is_told_what_does_not_go(world, make_agent, tmp_path):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    x = np.random.default_rng(0).uniform(-1, 1, (3, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=x @ build_model(1)[1])
    story = Path(__file__).with_name("triton_story.py")
    command = [str(PYTHON), str(story), str(agent.port), str(tmp_path / "data.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "unchanged\n"), done.stderr
