"""Sealed releases on a device: pack, publish, fetch, open, serve; and what is refused."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from edgekit.bundle.sealing import make_identity, seal_models
from edgekit.bundle.writer import Draft, write_bundle
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.digest import digest_bytes, hex_of
from edgekit.schema.manifest import Manifest
from tests.agent import world as worlds
from tests.agent.world import build_golden, build_manifest, build_model, wait_for

AGE_MAGIC = b"age-encryption.org"


class Key:
    def __init__(self, folder, name):
        self.private = folder / f"{name}.age"
        self.recipient = make_identity(self.private, folder / f"{name}.age.pub")


@pytest.fixture
def device(tmp_path):
    return Key(tmp_path, "device")


@pytest.fixture
def stranger(tmp_path):
    return Key(tmp_path, "stranger")


def publish_sealed(world, version, recipients, *, seed, is_damaged=False):
    """Publish a sealed release; a damaged one was packed with a flipped bit, and is signed like that."""
    model, weights = build_model(seed)
    blobs = {(0, "model"): model, (0, "golden"): build_golden(weights)}
    draft = Draft(build_manifest(version=version, blobs=blobs), {digest_bytes(data): data for data in blobs.values()})
    sealed = seal_models(draft, recipients)
    if is_damaged:
        sealed = with_flipped_bit(sealed)
    out = world.bundles / f"m-{version}.edgekit"
    write_bundle(sealed.manifest, sealed.blobs, signer=world.signer, out=out)
    worlds.publish(world.folder, out, keys=[world.signer.public_key])
    return sealed.manifest


def with_flipped_bit(draft):
    old = draft.manifest.variants[0].model
    data = draft.blobs[old]
    data = data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
    text = encode_json(draft.manifest).decode().replace(old, digest_bytes(data))
    rest = {digest: content for digest, content in draft.blobs.items() if digest != old}
    return Draft(decode_json(text, Manifest), rest | {digest_bytes(data): data})


def assert_nothing_sealed_left(agent):
    files = [path for path in agent.state_dir.rglob("*") if path.is_file()]
    assert files
    for path in files:
        data = path.read_bytes()
        assert not data.startswith(AGE_MAGIC), path
        assert b"AGE-SECRET-KEY" not in data, path
    parts = agent.state_dir / "parts"
    assert not parts.is_dir() or not list(parts.iterdir())


def weights_bytes(seed):
    return build_model(seed)[1].tobytes()


def test_sealed_release_opened_and_served(world, make_agent, device, stranger):
    world.publish("1.0", seed=1)
    agent = make_agent(age_identity=str(device.private)).start()
    agent.wait_served("1.0")
    publish_sealed(world, "2.0", [stranger.recipient, device.recipient], seed=2)
    agent.wait_committed("2.0")
    x = [0.1, -0.2, 0.3, 0.4]
    _, headers, body = agent.infer(x)
    np.testing.assert_allclose(body["outputs"][0]["data"], np.array(x, np.float32) @ build_model(2)[1], atol=1e-5)
    content = digest_bytes(build_model(2)[0])
    assert headers["edgekit-model-digest"] == content
    state = agent.wait_status(lambda body: body["state"]["phase"] == "idle")["state"]
    active = next(slot for slot in state["slots"] if slot["status"] == "active")
    assert active["model_digest"] == content
    blobs = agent.state_dir / "slots" / active["name"] / "blobs"
    assert sorted(path.name for path in blobs.iterdir()) == sorted(
        hex_of(digest_bytes(data)) for data in (build_model(2)[0], build_golden(build_model(2)[1]))
    )
    assert_nothing_sealed_left(agent)
    served = [path.read_bytes() for path in (world.folder / "blobs" / "sha256").iterdir()]
    assert any(weights_bytes(1) in data for data in served)
    assert not any(weights_bytes(2) in data for data in served)
    assert sum(data.startswith(AGE_MAGIC) for data in served) == 2
    agent.stop()
    world.stop()
    (agent.state_dir / "state.json").unlink()  # what the slots say of themselves is enough
    agent.start()
    agent.wait_served("2.0")
    assert not agent.logged("AGE-SECRET-KEY")


def test_release_for_others_refused_until_the_key_is_there(world, make_agent, device, stranger):
    world.publish("1.0", seed=1)
    agent = make_agent(age_identity=str(stranger.private)).start()
    agent.wait_served("1.0")
    publish_sealed(world, "2.0", [device.recipient], seed=2)
    found = agent.wait_status(lambda body: body["state"]["refusals"], what="the refusal")
    assert found["state"]["refusals"][0]["code"] == "device.sealed_not_recipient"
    assert not agent.logged("phase=stage release=m@2.0")  # refused before anything was downloaded
    assert agent.served() == "1.0"
    assert_nothing_sealed_left(agent)
    agent.stop()
    cured = make_agent(age_identity=str(device.private)).start()  # the same state folder
    cured.wait_served("2.0")
    assert cured.status()["state"]["refusals"] == []


def test_device_without_an_identity_or_the_library_refuses(world, make_agent, device, tmp_path):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    publish_sealed(world, "2.0", [device.recipient], seed=2)
    found = agent.wait_status(lambda body: body["state"]["refusals"], what="the refusal")
    assert found["state"]["refusals"][0]["code"] == "device.sealed_no_identity"
    assert agent.served() == "1.0"
    agent.stop()
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "pyrage.py").write_text("raise ModuleNotFoundError('pyrage')\n")
    agent = make_agent(age_identity=str(device.private))
    agent.start(PYTHONPATH=os.pathsep.join(filter(None, [str(shadow), os.environ.get("PYTHONPATH", "")])))
    found = agent.wait_status(lambda body: body["state"]["refusals"], what="the refusal")
    refusal = found["state"]["refusals"][0]
    assert refusal["code"] == "device.sealed_no_library"
    assert "pyrage" in refusal["reason"]
    agent.wait_served("1.0")


def test_damaged_seal_refused_and_changed_blob_not_installed(world, make_agent, device):
    world.publish("1.0", seed=1)
    agent = make_agent(age_identity=str(device.private)).start()
    agent.wait_served("1.0")
    publish_sealed(world, "2.0", [device.recipient], seed=2, is_damaged=True)
    found = agent.wait_status(lambda body: body["state"]["refusals"], what="the refusal")
    assert found["state"]["refusals"][0]["code"] == "bundle.sealed_damaged"
    found = agent.wait_status(lambda body: body["state"]["phase"] == "idle")
    assert sorted(slot["status"] for slot in found["state"]["slots"]) == ["active", "empty"]
    assert_nothing_sealed_left(agent)
    world.stop()
    manifest = publish_sealed(world, "3.0", [device.recipient], seed=3)
    path = world.folder / "blobs" / "sha256" / hex_of(manifest.variants[0].model)
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    world.start()
    agent.wait_status(lambda body: "sha256" in body["last_error"], what="the error")
    assert agent.served() == "1.0"
    path.write_bytes(good)
    agent.wait_served("3.0")
    agent.wait_status(lambda body: body["state"]["phase"] == "idle")
    assert_nothing_sealed_left(agent)


@pytest.mark.parametrize("step", ["staging", "verify"])
def test_killed_while_a_sealed_release_is_installed(world, make_agent, device, step):
    world.publish("1.0", seed=1)
    agent = make_agent(age_identity=str(device.private)).start()
    agent.wait_served("1.0")
    agent.stop()
    publish_sealed(world, "2.0", [device.recipient], seed=2)
    agent.start(EDGEKIT_FAULT=f"kill:{step}")
    assert agent.process.wait(30) == -signal.SIGKILL
    agent.start()
    agent.wait_served("2.0")
    agent.wait_status(lambda body: body["state"]["phase"] == "idle")
    assert_nothing_sealed_left(agent)


def test_identity_that_others_can_read_stops_the_agent_at_its_start(make_agent, device):
    device.private.chmod(0o644)
    agent = make_agent(age_identity=str(device.private)).start()
    wait_for(lambda: agent.process.poll() is not None, what="its end")
    assert agent.process.returncode == 2
    assert agent.logged("0644")
    assert not agent.logged("AGE-SECRET-KEY")
