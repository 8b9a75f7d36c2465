"""``edgekit fleet simulate`` as people call it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys

import pytest
from fleet_world import free_port, wait_until
from sqlalchemy import delete

from edgekit.fleet import tables
from edgekit.fleet.broker import EmbeddedBroker
from edgekit.fleet.config import parse_broker
from edgekit.fleet.ingest import Ingest
from edgekit.fleet.store import Store


@pytest.fixture(scope="module")
def broker():
    broker = EmbeddedBroker(free_port())
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "fleet.db"))
    yield store
    store.close()


def start_ingest(port: int, store: Store) -> Ingest:
    ingest = Ingest(store, parse_broker(f"mqtt://127.0.0.1:{port}"), client_id=f"ingest-{free_port()}")
    ingest.start()
    wait_until(lambda: ingest.status().is_broker_connected)
    return ingest


def command(*arguments: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "edgekit", "fleet", "simulate", *arguments], capture_output=True, text=True, check=False, **more
    )


def test_command_line_simulates_and_verifies(broker, store, tmp_path):
    ingest = start_ingest(broker.port, store)
    database, ledger = str(store.engine.url.database), str(tmp_path / "ledger")
    done = command(
        *("--devices", "40", "--broker", f"mqtt://127.0.0.1:{broker.port}", "--sites", "4", "--faults", "offline=20%"),
        *("--for", "10min", "--speed", "300", "--seed", "7", "--processes", "2", "--ledger", ledger, "--verify", database),
    )
    assert done.returncode == 0, done.stderr
    assert "lost 0  doubled 0  of 40 devices" in done.stdout
    assert "40 devices run kws@2.0.0" in done.stderr
    again = command("--devices", "0", "--ledger", ledger, "--verify", database, "--json")
    assert json.loads(again.stdout)["verdict"]["lost"] == 0
    with store.write() as connection:
        connection.execute(delete(tables.events))
    worse = command("--devices", "0", "--ledger", ledger, "--verify", database, "--json", "--settle", "0s")
    assert worse.returncode == 1
    ingest.stop()


def test_interrupt_ends_cleanly(broker, store):
    ingest = start_ingest(broker.port, store)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "edgekit", "fleet", "simulate", "--devices", "20", "--json"),
            *("--broker", f"mqtt://127.0.0.1:{broker.port}", "--telemetry-every", "1s"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: store.fleet(0).online == 20)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    summary = json.loads(out)["summary"]
    assert (process.returncode, summary["unacknowledged"]) == (0, 0)
    wait_until(lambda: store.fleet(0).online == 0)
    ingest.stop()


def test_broker_that_is_not_there_is_said(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        done = command("--devices", "2", "--for", "500ms", "--broker", f"mqtt://127.0.0.1:{probe.getsockname()[1]}")
    assert done.returncode == 1
    assert "no device was ever connected" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--faults", "fial=5%"), "Did you mean"),
        (("--model", "kws"), "NAME@VERSION"),
        (("--broker", "mqtt://example.org"), "without TLS"),
        (("--devices", "0", "--verify", "x.db"), "--ledger"),
        (("--baseline", "missing.json"), "missing.json"),
        (("--fleet-key", "missing.pub"), "missing.pub"),
    ],
)
def test_wrong_usage_is_told_before_anything_begins(arguments, words):
    done = command("--for", "1s", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_profile_can_be_written_and_read_again(tmp_path):
    path = tmp_path / "profile.json"
    assert command("--write-profile", str(path)).returncode == 0
    assert json.loads(path.read_text())["samples"] == 10_000
