"""A disk that is really full: the state folder on a small tmpfs in a mount namespace of the agent's own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.agent.world import wait_for

DISK = "2m"
MODEL_BYTES = 900_000
FILLER_BYTES = 700_000


def in_namespace(folder: Path) -> tuple[str, ...]:
    script = f'mount -t tmpfs -o size={DISK} tmpfs {folder} && exec "$@"'
    return ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh")


@pytest.fixture
def namespace(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    done = subprocess.run([*in_namespace(folder), "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this system does not let us mount a small disk: {done.stderr.strip()}")
    return in_namespace(folder)


@pytest.mark.fault("F4")
def test_full_disk_at_install_refused_clearly_and_recovered_from(world, make_agent, namespace):
    world.publish("1.0", seed=1)
    agent = make_agent(disk_reserve_bytes=0).start(prefix=namespace)
    agent.wait_served("1.0")
    seen = Path(f"/proc/{agent.process.pid}/root") / agent.state_dir.relative_to("/")
    filler = seen / "filler"
    filler.write_bytes(bytes(FILLER_BYTES))
    world.publish("2.0", seed=2, padding=MODEL_BYTES)
    agent.wait_served("2.0")
    world.publish("3.0", seed=3, padding=MODEL_BYTES)
    found = agent.wait_status(lambda body: "free" in body["last_error"], what="the error")
    assert found["state"]["refusals"] == []
    assert agent.logged("code=device.disk_full")
    assert agent.infer([0, 0, 0, 0])[0] == 200
    assert sorted(slot["status"] for slot in found["state"]["slots"]) == ["active", "good"]
    assert list((seen / "parts").iterdir()) == []
    filler.unlink()
    agent.wait_served("3.0")
    wait_for(lambda: agent.status()["state"]["phase"] == "idle")


@pytest.mark.fault("F4")
def test_disk_without_a_free_byte_stops_neither_serving_nor_the_agent(world, make_agent, namespace):
    """Not even the state file can be written; the agent goes on, and installs when there is room."""
    world.publish("1.0", seed=1)
    agent = make_agent(disk_reserve_bytes=0).start(prefix=namespace)
    agent.wait_served("1.0")
    seen = Path(f"/proc/{agent.process.pid}/root") / agent.state_dir.relative_to("/")
    with (seen / "filler").open("wb", buffering=0) as file:
        for size in (65536, 4096):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    world.publish("2.0", seed=2)
    agent.wait_status(lambda body: "full" in body["last_error"] or "are free" in body["last_error"], what="the error")
    assert agent.logged("code=device.disk_full")
    assert agent.infer([0, 0, 0, 0])[0] == 200
    assert agent.served() == "1.0"
    (seen / "filler").unlink()
    agent.wait_served("2.0")


@pytest.mark.fault("F4")
def test_agent_starts_and_serves_on_a_disk_without_a_free_byte(world, make_agent, tmp_path):
    """After a power cut in the middle of an installation nothing can be tidied up or spooled; the model serves all the same."""
    world.publish("1.0", seed=1)
    agent = make_agent(broker="mqtt://127.0.0.1:1", disk_reserve_bytes=0).start()
    agent.wait_served("1.0")
    agent.stop()
    world.publish("2.0", seed=2)
    agent.start(EDGEKIT_FAULT="kill:staging")
    agent.process.wait(30)
    kept = tmp_path / "kept"
    agent.state_dir.rename(kept)
    agent.state_dir.mkdir()
    (kept / "agent.lock").unlink()
    full = f"cp -a {kept}/. {agent.state_dir} && (dd if=/dev/zero of={agent.state_dir}/filler bs=4096 2>/dev/null || true)"
    prefix = in_namespace(agent.state_dir)
    prefix = (*prefix, "sh", "-c", f'{full}; exec "$@"', "sh")
    done = subprocess.run([*in_namespace(agent.state_dir), "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this system does not let us mount a small disk: {done.stderr.strip()}")
    agent.start(prefix=prefix)
    agent.wait_served("1.0")
    assert agent.infer([0, 0, 0, 0])[0] == 200
    seen = Path(f"/proc/{agent.process.pid}/root") / agent.state_dir.relative_to("/")
    (seen / "filler").unlink()
    agent.wait_served("2.0")
