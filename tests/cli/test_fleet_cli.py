"""``edgekit fleet`` on the command line: the real server as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from edgekit.fleet.store import Store
from edgekit.fleet.writing import Received
from edgekit.schema.message import Birth

ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("EDGEKIT_")} | {"NO_COLOR": "1"}


def edgekit(*arguments, **variables):
    command = [sys.executable, "-m", "edgekit", "fleet", *arguments]
    environment = ENVIRONMENT | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "fleet.db"
    store = Store(str(path))
    message = Birth(boot=7, seq=1, time_ms=1, metrics=())
    store.apply([Received(site="lab", device="pi-1", message=message, received_ms=time.time_ns() // 1_000_000)])
    store.close()
    return path


@pytest.fixture
def serve(tmp_path, database):
    processes = []

    def start(*extra):
        port, broker_port = free_port(), free_port()
        command = [sys.executable, "-m", "edgekit", "fleet", "serve", "--port", str(port), "--broker-port", str(broker_port)]
        process = subprocess.Popen(
            [*command, "--db", str(database), *extra],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | {"TMPDIR": str(tmp_path)},
        )
        processes.append(process)
        for line in process.stderr:
            if line.startswith("dashboard"):
                break
        return process, port, broker_port

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_server_answers_when_it_says_so_and_ends_cleanly(serve, tmp_path):
    process, port, broker_port = serve()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/health", timeout=10) as answer:
        assert json.load(answer)["version"]
    done = edgekit("devices", "--url", f"http://127.0.0.1:{port}")
    assert "lab/pi-1" in done.stdout
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, "")
    assert "Traceback" not in stderr
    assert list(Path(tmp_path).glob("edgekit-broker-*")) == []
    for freed in (port, broker_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", freed))


def test_interrupted_server_ends_cleanly(serve, tmp_path):
    process, _port, _broker_port = serve()
    process.send_signal(signal.SIGINT)
    _stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert list(Path(tmp_path).glob("edgekit-broker-*")) == []


def test_port_in_use_is_named(serve, database):
    _process, port, _broker_port = serve()
    done = edgekit("serve", "--port", str(port), "--broker-port", str(free_port()), "--db", str(database))
    assert done.returncode == 3
    assert str(port) in done.stderr
    assert "--port" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("--allow-remote",)])
def test_listening_off_loopback_needs_a_token(arguments):
    done = edgekit("serve", "--host", "0.0.0.0", *arguments)
    assert done.returncode == 2
    assert "EDGEKIT_FLEET_TOKEN" in done.stderr


def test_devices_of_a_database(database):
    assert "lab/pi-1" in edgekit("devices", "--db", str(database)).stdout
    records = json.loads(edgekit("devices", "--db", str(database), "--json").stdout)
    assert [(record["device"], record["state"]) for record in records] == [("pi-1", "online")]
    assert json.loads(edgekit("devices", "--db", str(database), "--state", "offline", "--json").stdout) == []


def test_devices_of_nothing(tmp_path):
    missing = edgekit("devices", "--db", str(tmp_path / "none.db"))
    assert missing.returncode == 2
    assert "none.db" in missing.stderr
    assert not (tmp_path / "none.db").exists()
    nobody = edgekit("devices", "--url", f"http://127.0.0.1:{free_port()}")
    assert nobody.returncode == 3
    assert "edgekit fleet serve" in nobody.stderr
    asleep = edgekit("devices", "--state", "asleep")
    assert asleep.returncode == 2
