"""The README's tour is run as it stands; its waits are the only addition."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PORTS = {"8600": "repository", "8420": "fleet", "1883": "broker", "8080": "agent"}


def tour() -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(r"<!-- tour -->\n```sh\n(.*?)```", text, flags=re.DOTALL)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


WAIT_FOR_RELEASE = """
for _ in $(seq 300); do
    if curl_ready http://127.0.0.1:{agent}/v2/health/ready; then break; fi
    sleep 0.2
done
"""
CURL = """
set -euo pipefail
curl_ready() {{ "{python}" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=2)' "$1" 2>/dev/null; }}
"""


def test_tour_runs_as_written(tmp_path):
    blocks = tour()
    assert len(blocks) == 5
    ports = {old: free_port() for old in PORTS}
    script = (
        CURL.format(python=sys.executable)
        + "\n".join(blocks[:4])
        + WAIT_FOR_RELEASE.format(agent=8080)
        + "sleep 6\n"
        + blocks[4]
    )
    for old, new in ports.items():
        script = re.sub(rf"\b{old}\b", new, script)
    (tmp_path / "sample_models").symlink_to(ROOT / "sample_models")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(240)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    text = output.read_text()
    assert code == 0, text[-3000:]
    last = text[text.rindex("device") :]
    assert "fashion" in text, text[-3000:]
    assert "bench-1" in text, last


@pytest.mark.parametrize(
    "path",
    sorted(set(re.findall(r"`((?:edgekit|docs|targets|scripts|sample_models)/[\w./-]+)`", (ROOT / "README.md").read_text()))),
)
def test_named_path_exists(path):
    assert (ROOT / path).exists(), path
