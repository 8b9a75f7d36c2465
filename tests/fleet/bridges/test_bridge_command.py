"""``edgekit fleet bridge`` as people call it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from fleet_world import WireDevice, birth, free_port, reported, wait_until, window, windows
from plain_mosquitto import PlainMosquitto, needs_mosquitto
from sparkplug_world import by_name, parse, value_of
from test_bridges_whole import Host

from edgekit.errors import UsageError
from edgekit.fleet.bridges.homeassistant import HomeAssistant

COMMAND = (sys.executable, "-m", "edgekit", "fleet", "bridge")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sparkplug", "--group-id", "a/b", "--target-broker", "mqtt://127.0.0.1"), "--group-id"),
        (("sparkplug", "--group-id", "a", "--target-broker", "mqtt://example.org"), "without TLS"),
        (("sparkplug", "--group-id", "a", "--primary-host", "x#", "--target-broker", "mqtt://127.0.0.1"), "--primary-host"),
        (("home-assistant", "--target-broker", "mqtt://127.0.0.1", "--topic", "a/#"), "a/#"),
        (("json", "--broker", "http://127.0.0.1"), "not an address"),
    ],
)
def test_wrong_usage_is_told(arguments, words):
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr


def test_server_that_is_not_there_is_told_at_once():
    url = f"http://127.0.0.1:{free_port()}"
    arguments = ("sparkplug", "--group-id", "a", "--target-broker", "mqtt://127.0.0.1", "--url", url)
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "does not answer" in done.stderr


@pytest.mark.parametrize("topic", ["", "/a", "a/", "$SYS/x", "a/+/b"])
def test_topics_that_cannot_be_published_below_are_refused(topic):
    with pytest.raises(UsageError):
        HomeAssistant(topic=topic)


@pytest.fixture
def broker(tmp_path):
    broker = PlainMosquitto(tmp_path)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def server(tmp_path, broker):
    port, log = free_port(), tmp_path / "server.log"
    command = (sys.executable, "-m", "edgekit", "fleet", "serve", "--port", str(port), "--db", str(tmp_path / "fleet.db"))
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--broker", f"mqtt://127.0.0.1:{broker.port}"], stdout=file, stderr=file)
    try:
        wait_until(lambda: "dashboard" in log.read_text() or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@needs_mosquitto
def test_bridge_beside_a_fleet_server(broker, server):
    """The whole way: a device's messages, the server's API, and a Sparkplug birth at another client; Ctrl-C ends it."""
    device, host = WireDevice(broker.port, "cam-1"), Host(broker.port, "spBv1.0/#")
    device.send("status", birth())
    device.send("rep", reported())
    device.send("w", windows(window(3)))
    target = ("--target-broker", f"mqtt://127.0.0.1:{broker.port}", "--url", server, "--every", "200ms")
    bridge = subprocess.Popen([*COMMAND, "sparkplug", "--group-id", "g", *target], stderr=subprocess.DEVNULL)
    try:
        born = by_name(parse(host.wait("DBIRTH/lab/cam-1").payload))
        assert [value_of(born[name]) for name in ("State", "Model/Version")] == ["online", "1.0.0"]
        bridge.send_signal(signal.SIGINT)
        assert bridge.wait(15) == 0
        host.wait("NDEATH/lab")
    finally:
        bridge.kill()
        bridge.wait()
        host.close()
        device.close()
