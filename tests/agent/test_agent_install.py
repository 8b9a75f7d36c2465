"""The agent as a process: install, serve, refuse, recover; over a real repository."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.agent.world import Agent, World, build_model, wait_for

DIGITS = 64


def weights_of(seed):
    return build_model(seed)[1]


def test_install_serve_infer_and_stop(world, make_agent):
    agent = make_agent()
    agent.start()
    wait_for(lambda: agent.get("/v2/health/live")[0] == 200, what="health")
    assert agent.get("/v2/health/ready")[0] == 503
    release = world.publish("1.0", seed=1)
    agent.wait_served("1.0")
    assert agent.get("/v2/health/ready") == (200, {"ready": True})
    x = [0.1, -0.2, 0.3, 0.4]
    status, headers, body = agent.infer(x)
    assert status == 200
    np.testing.assert_allclose(body["outputs"][0]["data"], np.array(x, np.float32) @ weights_of(1), atol=1e-5)
    digest = body["parameters"]["model_digest"]
    assert headers["edgekit-model-digest"] == digest
    assert (body["model_name"], body["model_version"]) == ("m", "1.0")
    found = agent.status()
    active = next(slot for slot in found["state"]["slots"] if slot["status"] == "active")
    assert (active["manifest"], active["model_digest"], active["counter"]) == (release.manifest_digest, digest, 1)
    assert found["requests"] == 1
    assert found["state"]["phase"] == "idle"
    assert agent.stop() == 0
    assert agent.logged("event=install_finished")


def test_bad_requests_answered_with_their_reason(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    for data, more, code in [
        ([1, 2, 3], {"shape": [1, 3]}, "data.shape"),
        ([1, 2, 3, 4], {"datatype": "FP64"}, "data.dtype"),
        ([1, 2, 3, 4], {"name": "z"}, "data.missing_input"),
        ([1, 2, 3, 1e39], {}, "data.not_finite"),
        ([1, 2, 3], {}, "data.shape"),
    ]:
        status, _, body = agent.infer(data, **more)
        assert (status, body["code"]) == (400, code), body
        assert body["error"]
    assert agent.get("/v2/models/other")[0] == 404
    assert agent.get("/v2/models/m/versions/9")[0] == 404
    assert agent.get("/v2/models/m/versions/1.0/ready")[0] == 200
    assert agent.get("/v2/models/m/infer")[0] == 405
    assert agent.get("/nothing")[0] == 404
    assert agent.infer([0, 0, 0, 0])[0] == 200


def test_update_swaps_and_broken_release_is_refused_once(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    world.publish("2.0", seed=2)
    agent.wait_served("2.0")
    broken = world.publish("3.0", seed=3, broken=True)
    found = agent.wait_status(lambda body: body["state"]["refusals"], what="the refusal")
    (refusal,) = found["state"]["refusals"]
    assert (refusal["version"], refusal["manifest"], refusal["code"]) == ("3.0", broken.manifest_digest, "selftest.mismatch")
    assert "golden" in refusal["reason"]
    assert agent.served() == "2.0"
    assert sorted(slot["status"] for slot in found["state"]["slots"]) == ["active", "empty"]
    world.publish("4.0", seed=4)
    agent.wait_served("4.0")
    assert agent.log.read_text().count("event=install_refused") == 1


def test_model_that_does_not_load_refused(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    world.publish("2.0", seed=2, model=b"this is no model")
    found = agent.wait_status(lambda body: body["state"]["refusals"], what="the refusal")
    assert found["state"]["refusals"][0]["code"] == "model.unloadable"
    assert agent.infer([0, 0, 0, 0])[0] == 200


def test_tampered_blob_not_installed_and_good_one_installed_later(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    world.stop()
    world.publish("2.0", seed=2)
    path = world.blob_of(2)
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    world.start()
    found = agent.wait_status(lambda body: "digest" in body["last_error"] or "sha256" in body["last_error"], what="the error")
    assert agent.served() == "1.0"
    assert found["state"]["refusals"] == []
    path.write_bytes(good)
    agent.wait_served("2.0")
    assert agent.logged("code=trust.digest")


def test_unreachable_repository_stops_nothing(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    world.stop()
    agent.wait_status(lambda body: body["last_error"], what="the error")
    agent.stop()
    agent.start()
    agent.wait_served("1.0")
    assert agent.infer([0, 0, 0, 0])[0] == 200
    world.start()
    world.publish("2.0", seed=2)
    agent.wait_served("2.0")
    agent.wait_status(lambda body: not body["last_error"], what="the error's end")


STEPS = (
    "fetch",
    "precheck",
    "fetched_blob",
    "stage",
    "staging",
    "verify",
    "selftest",
    "tested",
    "switch",
    "switched",
    "report",
    "reported",
    "committing",
    "committed",
    "telling",
)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """A repository with two releases, and the state folder of an agent that installed the first."""
    folder = tmp_path_factory.mktemp("halfway")
    world = World(folder)
    world.publish("1.0", seed=1)
    agent = Agent(folder, repository=world.url, root=str(world.root)).start()
    agent.wait_committed("1.0")
    agent.stop()
    world.publish("2.0", seed=2)
    yield world, agent.state_dir
    world.stop()


@pytest.mark.fault("F1")
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_step_comes_back_servable(halfway, tmp_path, request, step):
    world, template = halfway
    agent = Agent(tmp_path, repository=world.url, root=str(world.root))
    request.addfinalizer(agent.stop)
    shutil.copytree(template, agent.state_dir, ignore=shutil.ignore_patterns("inbox"))
    agent.start(EDGEKIT_FAULT=f"kill:{step}")
    assert agent.process.wait(30) == -signal.SIGKILL
    world.stop()
    agent.start()
    wait_for(lambda: agent.served() in {"1.0", "2.0"}, what="a servable state without the repository")
    assert agent.infer([0, 0, 0, 0])[0] == 200
    if step in {"switched", "report", "reported", "committing", "committed", "telling"}:
        assert agent.served() == "2.0"
    world.start()
    agent.wait_served("2.0")
    state = agent.wait_status(lambda body: body["state"]["floors"]["releases"] == {"m": 2}, what="the commit")["state"]
    assert (state["phase"], state["probation"], state["refusals"]) == ("idle", None, [])


def test_killed_while_refusing_refuses_once_more_or_remembers(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    agent.stop()
    world.publish("2.0", seed=2, broken=True)
    agent.start(EDGEKIT_FAULT="kill:refused")
    assert agent.process.wait(30) == -signal.SIGKILL
    agent.start()
    agent.wait_served("1.0")
    found = agent.wait_status(lambda body: body["state"]["refusals"] and body["last_refresh_at"])
    assert [refusal["version"] for refusal in found["state"]["refusals"]] == ["2.0"]


@pytest.mark.fault("F2")
def test_device_that_dies_in_every_self_test_stops_trying(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    agent.stop()
    world.publish("2.0", seed=2)
    for _ in range(3):
        agent.start(EDGEKIT_FAULT="kill:selftest")
        assert agent.process.wait(30) == -signal.SIGKILL
    agent.start(EDGEKIT_FAULT="kill:selftest")
    agent.wait_served("1.0")
    found = agent.wait_status(lambda body: body["last_refresh_at"])
    assert found["state"]["refusals"][0]["code"] == "install.interrupted"
    assert agent.process.poll() is None


def test_worker_killed_is_restarted(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    wait_for(lambda: len(agent.worker_pids()) == 1, what="the first worker's end")
    (pid,) = agent.worker_pids()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: agent.worker_pids() not in ([], [pid]), what="the restart")
    agent.wait_served("1.0")
    assert agent.infer([0, 0, 0, 0])[0] == 200
    assert agent.logged("event=worker_crashed")


def test_worker_that_keeps_dying_falls_back_to_the_other_slot(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    world.publish("2.0", seed=2)
    agent.wait_committed("2.0")
    wait_for(lambda: len(agent.worker_pids()) == 1, what="the old worker's end")
    for _ in range(3):
        agent.wait_served("2.0")
        wait_for(lambda: len(agent.worker_pids()) == 1, what="one worker")
        os.kill(agent.worker_pids()[0], signal.SIGKILL)
        wait_for(lambda: agent.get("/v2/health/live")[0] == 200)
    agent.wait_served("1.0")
    found = agent.status()
    assert found["state"]["refusals"][0]["code"] == "worker.crash_loop"
    assert agent.logged("event=rolled_back")


@pytest.mark.fault("F24")
def test_damaged_active_slot_falls_back_at_start_and_is_fetched_again(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    world.publish("2.0", seed=2)
    agent.wait_committed("2.0")
    state = agent.status()["state"]
    agent.stop()
    world.stop()
    active = next(slot for slot in state["slots"] if slot["status"] == "active")
    path = agent.state_dir / "slots" / active["name"] / "blobs" / active["model_digest"].removeprefix("sha256:")
    assert len(path.name) == DIGITS
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    agent.start()
    agent.wait_served("1.0")
    assert agent.status()["state"]["floors"]["releases"] == {"m": 2}
    world.start()
    agent.wait_served("2.0")


@pytest.mark.fault("F30")
def test_second_agent_on_the_same_state_folder_refused(make_agent):
    agent = make_agent().start()
    wait_for(lambda: agent.get("/v2/health/live")[0] == 200)
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", "agent", "run", "--config", str(agent.config), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 3
    assert "another agent" in done.stderr
    assert agent.get("/v2/health/live")[0] == 200


def test_port_in_use_refused(make_agent, tmp_path):
    agent = make_agent().start()
    wait_for(lambda: agent.get("/v2/health/live")[0] == 200)
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", "agent", "run", "--port", str(agent.port), "--state-dir", str(tmp_path / "other")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 3
    assert f"127.0.0.1:{agent.port}" in done.stderr
    assert "--port" in done.stderr
