"""From an empty folder to a device that reports over mutual TLS, and is shut out: by the commands that people type."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agent.broker_world import MOSQUITTO, needs_mosquitto
from tests.agent.world import free_port, wait_for

ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("EDGEKIT_")} | {"NO_COLOR": "1"}


class Site:
    """A folder in which commands run; servers end with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen] = []
        self.variables: dict[str, str] = {}

    def edgekit(self, *words, code: int = 0) -> str:
        command = [sys.executable, "-m", "edgekit", *map(str, words)]
        environment = ENVIRONMENT | self.variables
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def start(self, name: str, *command) -> subprocess.Popen:
        log = (self.folder / f"{name}.log").open("ab")
        with log:
            process = subprocess.Popen(
                list(map(str, command)), cwd=self.folder, env=ENVIRONMENT | self.variables, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def serve(self, name: str, ready: str, *words) -> subprocess.Popen:
        process = self.start(name, sys.executable, "-m", "edgekit", *words)
        wait_for(lambda: ready in self.log(name) or process.poll() is not None, what=name)
        assert process.poll() is None, self.log(name)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.close()


@needs_mosquitto
@pytest.mark.fault("F22")
def test_device_joins_reports_and_is_shut_out(site, tmp_path):
    fingerprint = site.edgekit("fleet", "ca", "init", "ca", "--name", "story").strip()
    assert (tmp_path / "ca/ca.key").stat().st_mode & 0o777 == 0o600
    port, server_port, fleet_port, repository_port = (free_port() for _ in range(4))
    listening = ("--address", "127.0.0.1", "--port", port, "--server-port", server_port)
    places = ("--data", tmp_path / "data", "--user", "root")
    site.edgekit("fleet", "broker-config", "--out", "broker", "--authority", "ca", "--host", "localhost", *listening, *places)
    site.edgekit("fleet", "ca", "issue", "ca", "edgekit-fleet", "--client", "--host", "localhost")
    site.edgekit("fleet", "ca", "issue", "ca", "repository", "--host", "localhost")
    (tmp_path / "ca/ca.key").rename(tmp_path / "off-line.key")

    (tmp_path / "data").mkdir()
    mosquitto = site.start("mosquitto", MOSQUITTO, "-c", "broker/mosquitto.conf")
    site.edgekit("repo", "init", "repository")
    (tmp_path / "clients.pem").write_text((tmp_path / "ca/devices.pem").read_text() + (tmp_path / "ca/ca.pem").read_text())
    tls = ("--tls-cert", "ca/issued/repository.pem", "--tls-key", "ca/issued/repository.key")
    clients = ("--client-ca", "clients.pem", "--crl", "broker/crl.pem")
    site.serve("repository", "serving at", "repo", "serve", "repository", "--port", str(repository_port), *tls, *clients)
    mine = ("ca/issued/edgekit-fleet.pem", "ca/issued/edgekit-fleet.key")
    site.serve(
        "fleet",
        "dashboard",
        *("fleet", "serve", "--port", str(fleet_port), "--db", "fleet.db", "--broker", f"mqtts://localhost:{server_port}"),
        *("--ca", "ca/ca.pem", "--cert", mine[0], "--cert-key", mine[1], "--tls-cert", mine[0], "--tls-key", mine[1]),
        *("--authority", "ca", "--broker-dir", "broker", "--device-broker", f"mqtts://localhost:{port}"),
        *("--device-repository", f"https://localhost:{repository_port}"),
        *("--repository", f"https://localhost:{repository_port}", "--repository-root", "repository/metadata/1.root.json"),
    )
    url = f"https://localhost:{fleet_port}"
    site.variables["SSL_CERT_FILE"] = str(tmp_path / "ca/ca.pem")
    claim = site.edgekit("fleet", "claim", "lab/cam-7", "--label", "room=a", "--url", url).strip()
    del site.variables["SSL_CERT_FILE"]
    known = ("--ca-fingerprint", fingerprint)
    told = site.edgekit("agent", "enroll", url, "--claim", claim, *known, "--state-dir", "state")
    assert told == "lab/cam-7\n"
    again = site.edgekit("agent", "enroll", url, "--claim", claim, *known, "--state-dir", "thief", code=4)
    assert "the claim was refused" in again
    run = ("agent", "run", "--state-dir", "state", "--root", "repository/metadata/1.root.json", "--port", "0")
    agent = site.serve("agent", "agent_listening", *run, "--model", "kws", "--poll-s", "0.5")
    site.variables["SSL_CERT_FILE"] = str(tmp_path / "ca/ca.pem")

    def devices() -> list[dict]:
        return json.loads(site.edgekit("fleet", "devices", "--url", url, "--json"))

    wait_for(lambda: [each["state"] for each in devices()] == ["online"], what="the device on the fleet's list")
    assert (devices()[0]["site"], devices()[0]["device"]) == ("lab", "cam-7")
    status = json.loads(site.edgekit("agent", "status", "--state-dir", "state", "--json"))
    assert status["is_broker_connected"]
    wait_for(
        lambda: json.loads(site.edgekit("agent", "status", "--state-dir", "state", "--json"))["last_refresh_at"],
        what="the repository over mutual TLS",
    )
    identities = json.loads(site.edgekit("fleet", "identities", "--url", url, "--json"))
    assert [(each["device"], each["state"], each["labels"]) for each in identities] == [("cam-7", "valid", {"room": "a"})]

    assert "repository_unreachable" not in site.log("fleet")
    said = site.edgekit("fleet", "revoke", "lab/cam-7", "--reason", "stolen", "--url", url)
    assert said == "lab/cam-7: revoked, 1 certificate(s)\n"
    site.edgekit("fleet", "broker-sync", "--out", "elsewhere", "--url", url)
    assert (tmp_path / "elsewhere/acl").read_text() == (tmp_path / "broker/acl").read_text()
    assert "user lab/cam-7\ntopic deny #" in (tmp_path / "elsewhere/acl").read_text()
    copied = (tmp_path / "elsewhere/crl.pem").stat().st_mtime_ns
    site.edgekit("fleet", "broker-sync", "--out", "elsewhere", "--url", url)
    assert (tmp_path / "elsewhere/crl.pem").stat().st_mtime_ns == copied
    mosquitto.send_signal(signal.SIGHUP)
    wait_for(lambda: "event=repository_unreachable" in site.log("agent"), what="the repository's refusal")
    agent.send_signal(signal.SIGTERM)
    agent.wait(15)
    again = site.serve("again", "agent_listening", *run, "--model", "kws", "--poll-s", "60")
    wait_for(lambda: "event=broker_unreachable" in site.log("again"), what="the broker's refusal")
    assert not json.loads(site.edgekit("agent", "status", "--state-dir", "state", "--json"))["is_broker_connected"]


def test_authority_is_made_once_and_tells_what_ends(site, tmp_path):
    site.edgekit(
        "fleet",
        "ca",
        "init",
        "ca",
        "--lifetime",
        "7d",
        "--domain",
        "example.com",
        "--domain",
        "10.0.0.0/8",
        "--server",
        "one",
        "--server",
        "two",
    )
    site.edgekit("fleet", "broker-config", "--out", "broker", "--authority", "ca")
    assert re.findall("^user (.*)", (tmp_path / "broker/acl").read_text(), re.MULTILINE) == ["one", "two"]
    assert "not replaced" in site.edgekit("fleet", "ca", "init", "ca", code=2)
    assert "not a length of time" in site.edgekit("fleet", "ca", "init", "other", "--lifetime", "soon", code=2)
    site.edgekit("fleet", "ca", "issue", "ca", "broker", "--host", "broker.example.com", "--days", "200")
    assert site.edgekit("fleet", "ca", "status", "ca").count("sha256:") == 3
    site.edgekit("fleet", "ca", "issue", "ca", "old", "--client", "--days", "10")
    assert "old.pem ends on" in site.edgekit("fleet", "ca", "status", "ca", code=1)
    (tmp_path / "ca/devices.key").chmod(0o644)
    serve = ("fleet", "serve", "--authority", "ca", "--port", str(free_port()), "--broker-port", str(free_port()))
    assert "expected mode 0600" in site.edgekit(*serve, "--db", "x.db", code=2)
    assert "no such file" in site.edgekit(*serve[:2], "--authority", "none", *serve[4:], "--db", "x.db", code=2).lower()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("fleet", "claim", "cam-7"), "expected SITE/DEVICE"),
        (("fleet", "claim", "lab/cam-7", "--for", "soon"), "not a length of time"),
        (("fleet", "claim", "lab/cam-7", "--label", "x"), "expected NAME=VALUE"),
        (("fleet", "identities", "--state", "odd"), "no such state"),
        (("fleet", "ca", "status", "nowhere"), "edgekit fleet ca init"),
        (("agent", "enroll", "http://fleet.example.com", "--claim", "a.b"), "without TLS"),
        (("agent", "enroll", "https://127.0.0.1:1"), "no claim was given"),
        (("agent", "enroll", "https://127.0.0.1:1", "--claim", "a.b", "--ca", "nowhere"), "nowhere"),
    ],
)
def test_wrong_words_are_answered_with_what_to_give(site, words, told):
    assert told in site.edgekit(*words, code=2)
