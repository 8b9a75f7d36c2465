"""A rollout with nothing simulated: repository, fleet server with its broker, and agents, each a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "agent"))
from world import Agent, World, free_port, wait_for

from edgekit.cli.fleet_http import send_json
from edgekit.errors import UsageError
from edgekit.trust.keys import save_public_key
from edgekit.trust.signer import generate_signer, save_signer


class FleetProcess:
    """``edgekit fleet serve``, to be killed and started again on the same database."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.port, self.broker_port = free_port(), free_port()
        signer = generate_signer()
        save_signer(signer, folder / "fleet.pem")
        (folder / "fleet-keys").mkdir()
        save_public_key(signer.public_key, folder / "fleet-keys" / "fleet.pub")
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        arguments = ["--port", str(self.port), "--broker-port", str(self.broker_port), "--db", str(self.folder / "fleet.db")]
        arguments += ["--repository", self.world.url, "--repository-root", str(self.world.root)]
        arguments += ["--fleet-key", str(self.folder / "fleet.pem")]
        with (self.folder / "fleet.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edgekit", "fleet", "serve", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(self.is_up, what="the fleet server's start")

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/health", timeout=2) as answer:
                return json.load(answer)["is_healthy"]
        except OSError:
            return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(20)

    def ask(self, path: str, body=None, method="GET"):
        return send_json(self.url, f"/api/v1{path}", body, method=method)

    def begin(self, version: str, **asked) -> int:
        request = {"model": "m", "version": version, "gates": [], "soak_min": 0.02, "waves": "canary:1,100%", **asked}
        wait_for(lambda: self._is_known(version), what=f"{version} in the catalog")
        return self.ask("/rollouts", request, "POST")["id"]

    def _is_known(self, version: str) -> bool:
        try:
            self.ask("/rollouts/dry-run", {"model": "m", "version": version}, "POST")
        except UsageError as error:
            return "no such release" not in error.message
        return True

    def wait(self, number: int, *states: str) -> dict:
        def settled():
            view = self.ask(f"/rollouts/{number}")
            return view if view["progress"]["state"] in states else None

        try:
            return wait_for(settled, seconds=60, what=f"rollout {number} {' or '.join(states)}")
        except AssertionError as error:
            found = json.dumps(self.ask(f"/rollouts/{number}"), indent=1)[:3000]
            raise AssertionError(f"{error}\n{found}\n{(self.folder / 'fleet.log').read_text()[-3000:]}") from error


@pytest.fixture
def fleet(tmp_path):
    world = World(tmp_path)
    server = FleetProcess(tmp_path, world)
    agents = []
    for name in ("cam-1", "cam-2"):
        (tmp_path / name).mkdir()
        agents.append(
            Agent(
                tmp_path / name,
                device=name,
                repository=world.url,
                root=str(world.root),
                broker=f"mqtt://127.0.0.1:{server.broker_port}",
                fleet_keys=str(tmp_path / "fleet-keys"),
                window_s=1.0,
            )
        )
    server.agents = agents
    yield server
    for agent in agents:
        agent.stop()
    server.stop()
    world.stop()


def reported(server: FleetProcess) -> int:
    return len(server.ask("/devices")["devices"])


def test_release_reaches_devices_in_waves_and_is_taken_back(fleet):
    fleet.world.publish("1.0", seed=1)
    fleet.world.publish("2.0", seed=2)
    fleet.world.publish("3.0", seed=3, broken=True)
    fleet.start()
    for agent in fleet.agents:
        agent.start()
    wait_for(lambda: reported(fleet) == 2, what="both devices")
    fleet.wait(fleet.begin("1.0"), "done")
    assert [agent.served() for agent in fleet.agents] == ["1.0", "1.0"]

    second = fleet.begin("2.0")
    view = fleet.wait(second, "done")
    assert [wave["committed"] for wave in view["waves"]] == [1, 1]
    fleet.ask(f"/rollouts/{second}/rollback", {"reason": "people complain"}, "POST")
    fleet.wait(second, "rolled_back")
    for agent in fleet.agents:
        agent.wait_served("1.0")

    third = fleet.begin("3.0")  # its golden samples do not fit: the canary refuses it, and that is the end of it
    view = fleet.wait(third, "rolled_back")
    assert "1 of 1 devices failed, 0 may" in view["progress"]["reason"]
    assert [wave["waiting"] for wave in view["waves"]] == [0, 1]
    assert [agent.served() for agent in fleet.agents] == ["1.0", "1.0"]


@pytest.mark.fault("F27")
def test_server_killed_again_and_again_finishes_the_rollout(fleet):
    fleet.world.publish("1.0", seed=1)
    fleet.start()
    for agent in fleet.agents:
        agent.start()
    wait_for(lambda: reported(fleet) == 2, what="both devices")
    number = fleet.begin("1.0", soak_min=0.1)
    for pause in (0.3, 1.0, 2.2):
        time.sleep(pause)
        fleet.kill()
        fleet.start()
    view = fleet.wait(number, "done")
    assert [wave["committed"] for wave in view["waves"]] == [1, 1]
    for agent in fleet.agents:
        agent.wait_committed("1.0")
        assert agent.log.read_text().count("event=install_finished") == 1


def test_device_of_another_key_does_not_obey(fleet, tmp_path):
    other = generate_signer()
    (tmp_path / "other").mkdir()
    save_public_key(other.public_key, tmp_path / "other" / "other.pub")
    agent = fleet.agents[0]
    agent.config.write_text(agent.config.read_text().replace(str(tmp_path / "fleet-keys"), str(tmp_path / "other")))
    fleet.world.publish("1.0", seed=1)
    fleet.start()
    agent.start()
    wait_for(lambda: reported(fleet) == 1, what="the device")
    number = fleet.begin("1.0", deadline_min=0.05)
    view = fleet.wait(number, "rolled_back", "rolling_back")
    assert "silent" in view["progress"]["reason"]
    assert agent.served() == ""
    wait_for(lambda: agent.logged("event=desired_refused"), what="the refusal")
