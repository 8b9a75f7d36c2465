"""scripts/bench/outage.py in small: killed, cut off and deaf, and every window is stored once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.agent.broker_world import needs_mosquitto

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "outage.py"


@needs_mosquitto
@pytest.mark.fault("F19")
@pytest.mark.fault("F20")
@pytest.mark.parametrize("cap", [32 << 20, 60_000], ids=["all", "merged"])
def test_device_killed_in_an_outage_loses_and_doubles_nothing(cap):
    """Two simulated minutes; the small cap holds a fifth of their windows one by one."""
    options = ["--outage", "120", "--speed", "40", "--kills", "4", "--live", "1", "--cap", str(cap)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost 0, doubled 0" in done.stdout
    assert ("rows, 0 of them merged" in done.stdout) == (cap > 60_000), done.stdout
