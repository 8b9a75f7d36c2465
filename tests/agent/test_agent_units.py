"""Several models in one agent: each has its own releases and its own troubles; and one model's whole life on probation."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from edgekit.bundle.writer import write_bundle
from edgekit.schema.digest import digest_bytes
from edgekit.trust.keys import save_public_key
from tests.agent.test_agent_swap import Counter, load
from tests.agent.world import assert_serves, build_golden, build_manifest, build_model, wait_for

TWO = {"models": {"n": {}}}


@pytest.fixture
def both(world, make_agent):
    """An agent with the models m and n."""

    def start(fault="", **settings):
        world.publish("1.0", seed=1)
        world.publish("1.0", seed=11, name="n")
        agent = make_agent(**(TWO | settings)).start(**({"EDGEKIT_FAULT": fault} if fault else {}))
        for name in ("m", "n"):
            agent.wait_served("1.0", name) if fault else agent.wait_committed("1.0", name)
        return agent

    return start


def ask_until_dead(agent, model, times):
    """Inferences until one is not answered; how many were."""
    for done in range(times):
        try:
            if agent.infer([0.1, 0.2, 0.3, 0.4], model=model)[0] != 200:
                return done
        except (OSError, Exception):  # noqa: BLE001 - the worker died under it
            return done
    return times


def test_two_models_installed_served_and_updated_one_at_a_time(world, both):
    agent = both()
    assert_serves(agent, 1)
    assert_serves(agent, 11, name="n")
    assert len(agent.worker_pids()) == 1 or wait_for(lambda: len(agent.worker_pids()) == 1)
    world.publish("2.0", seed=12, name="n")
    agent.wait_committed("2.0", "n")
    assert_serves(agent, 12, name="n")
    assert_serves(agent, 1)
    world.publish("2.0", seed=2, broken=True)
    found = agent.wait_status(lambda body: body["state"]["refusals"], what="the refusal")
    assert [(model["name"], model["serves"], model["version"]) for model in found["models"]] == [
        ("m", "slot", "1.0"),
        ("n", "slot", "2.0"),
    ]
    assert found["models"][1]["state"]["refusals"] == []
    assert (agent.state_dir / "models" / "n" / "state.json").is_file()
    assert agent.stop() == 0
    agent.start()
    agent.wait_served("1.0")
    assert_serves(agent, 12, name="n")


@pytest.mark.fault("F14")
def test_model_that_crashes_at_inference_50_is_rolled_back_and_the_other_goes_on(world, both):
    agent = both("segv:run m@2.0 50", probation={"inferences": 60, "seconds": 0.0})
    for model in ("m", "n"):
        assert ask_until_dead(agent, model, 60) == 60
    agent.wait_committed("1.0", "m")
    world.publish("2.0", seed=2)
    agent.wait_served("2.0")
    assert ask_until_dead(agent, "m", 60) == 49
    agent.wait_served("2.0")  # one crash may be bad luck
    assert_serves(agent, 11, name="n")
    assert ask_until_dead(agent, "m", 60) <= 49
    agent.wait_served("1.0")
    assert_serves(agent, 1)
    assert_serves(agent, 11, name="n")
    found = {model["name"]: model["state"] for model in agent.status()["models"]}
    assert [(refusal["version"], refusal["code"]) for refusal in found["m"]["refusals"]] == [("2.0", "probation.crashes")]
    assert (found["m"]["floors"]["releases"], found["n"]["refusals"]) == ({"m": 1}, [])
    assert agent.log.read_text().count("event=rolled_back") == 1
    assert ask_until_dead(agent, "m", 3) == 3
    world.publish("3.0", seed=3)  # the mended one is taken
    agent.wait_served("3.0")


@pytest.mark.fault("F31")
def test_no_request_fails_while_the_other_model_is_swapped(world, both):
    agent = both(drain_s=2.0)
    outcomes, failures = Counter(), []

    async def main():
        stop = asyncio.Event()
        running = asyncio.ensure_future(load(agent.port, stop, outcomes, failures))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(world.publish, "2.0", seed=12, name="n")
        await asyncio.to_thread(agent.wait_committed, "2.0", "n")
        await asyncio.to_thread(world.publish, "2.0", seed=2)
        await asyncio.to_thread(agent.wait_committed, "2.0", "m")
        stop.set()
        await running

    asyncio.run(main())
    assert failures == []
    assert {status for status, _, _ in outcomes} == {200}
    assert {version for _, version, _ in outcomes} == {"1.0", "2.0"}
    assert len(outcomes) == 2  # exactly one digest a version


def make_factory(world, tmp_path):
    model, weights = build_model(99)
    blobs = {(0, "model"): model, (0, "golden"): build_golden(weights)}
    manifest = build_manifest(version="0.1", blobs=blobs)
    path, keys = tmp_path / "factory.edgekit", tmp_path / "factory-keys"
    write_bundle(manifest, {digest_bytes(data): data for data in blobs.values()}, signer=world.signer, out=path)
    keys.mkdir()
    save_public_key(world.signer.public_key, keys / "maker.pub")
    return {"factory": str(path), "factory_keys": str(keys)}


@pytest.mark.fault("F16")
def test_factory_model_serves_when_no_slot_can(world, make_agent, tmp_path):
    settings = make_factory(world, tmp_path)
    agent = make_agent(**settings)
    world.stop()
    agent.start()  # nothing was ever installed
    agent.wait_served("0.1")
    assert_serves(agent, 99)
    world.start()
    world.publish("1.0", seed=1)
    agent.wait_committed("1.0")
    world.publish("2.0", seed=2)
    agent.wait_committed("2.0")
    state = agent.status()["state"]
    agent.stop()
    world.stop()
    for slot in state["slots"]:
        path = agent.state_dir / "slots" / slot["name"] / "blobs" / slot["model_digest"].removeprefix("sha256:")
        path.write_bytes(b"rot")
    agent.start()
    agent.wait_served("0.1")
    assert_serves(agent, 99)
    found = agent.status()
    assert (found["models"][0]["serves"], found["state"]["floors"]["releases"]) == ("factory", {"m": 2})
    assert agent.logged("factory.served")
    world.start()
    agent.wait_served("2.0")  # fetched again


def test_factory_model_of_somebody_else_is_not_served(world, make_agent, tmp_path):
    settings = make_factory(world, tmp_path)
    bundle = tmp_path / "factory.edgekit"
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    bundle.write_bytes(data)
    agent = make_agent(**settings).start()
    wait_for(lambda: agent.logged("the factory model"), what="the refusal")
    assert agent.get("/v2/health/ready")[0] == 503


def test_contract_change_refused_before_the_download_and_allowed_on_demand(world, make_agent, monkeypatch):
    import msgspec

    from tests.agent import world as worlds

    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_committed("1.0")
    other = msgspec.structs.replace(worlds.CONTRACT, labels=("a", "c", "b"))
    monkeypatch.setattr(worlds, "CONTRACT", other)
    world.publish("2.0", seed=2)
    found = agent.wait_status(lambda body: body["state"]["refusals"], what="the refusal")
    assert found["state"]["refusals"][0]["code"] == "precheck.contract"
    assert "labels" in found["state"]["refusals"][0]["reason"]
    assert not world_fetched(world, 2)
    assert_serves(agent, 1)
    agent.stop()
    agent.config.write_text("allow_contract_change = true\n" + agent.config.read_text())
    world.publish("3.0", seed=3)
    agent.start()
    agent.wait_served("3.0")


def world_fetched(world, seed):
    """Whether the blob of a model was asked for; the refused one's never is."""
    return any(world.blob_of(seed).name in path.name for path in world.folder.parent.glob("state/parts/*"))


def keep_asking(agent, stop, model="m"):
    def ask():
        while not stop.is_set():
            try:
                agent.infer([0.3, -0.2, 0.1, 0.4], model=model)
            except OSError:
                stop.wait(0.05)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread


def test_shadow_refuses_a_model_that_answers_otherwise_and_takes_one_that_agrees(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent(shadow={"samples": 25, "max_s": 30.0, "cpu_percent": 100.0}).start()
    agent.wait_committed("1.0")
    stop = threading.Event()
    thread = keep_asking(agent, stop)
    _, weights = build_model(1)
    reversed_weights = -weights
    from tests.agent.test_agent_selftest import onnx_linear

    world.publish("2.0", seed=2, model=onnx_linear(reversed_weights), golden=build_golden(reversed_weights))
    found = agent.wait_status(lambda body: body["state"]["refusals"], what="the refusal")
    assert found["state"]["refusals"][0]["code"] == "shadow.disagrees"
    assert_serves(agent, 1)
    world.publish("3.0", seed=3, model=onnx_linear(weights * 1.01), golden=build_golden(weights * np_float(1.01)))
    agent.wait_served("3.0")
    stop.set()
    thread.join(10)
    finished = [line for line in agent.log.read_text().splitlines() if "event=shadow_finished" in line]
    assert len(finished) == 2
    assert agent.status()["errors"] == 0


def np_float(value):
    import numpy as np

    return np.float32(value)


def test_status_is_json_for_people_and_programs(both):
    agent = both()
    body = agent.status()
    assert json.loads(json.dumps(body))["models"][1]["channel"] == "production"
    assert {model["name"] for model in body["models"]} == {"m", "n"}
