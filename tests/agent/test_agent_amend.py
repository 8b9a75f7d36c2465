"""An amended release on a device: no weight travels again."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest

from edgekit.bundle.amend import amend_bundle
from edgekit.bundle.reader import read_bundle
from edgekit.bundle.sealing import make_identity, seal_models
from edgekit.bundle.writer import Draft, write_bundle
from edgekit.cli.main import main
from edgekit.repository import server
from edgekit.schema.digest import digest_bytes
from tests.agent import world as worlds
from tests.agent.world import build_golden, build_manifest, build_model

SENT = re.compile(r'"GET (/\S+) HTTP/1\.1" (?:200|206) ')


class Traffic(logging.Handler):
    """Every answered request of the repository's server."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.paths: list[str] = []

    def emit(self, record):
        if match := SENT.search(record.getMessage()):
            self.paths.append(match.group(1))

    def take(self) -> list[str]:
        taken, self.paths = self.paths, []
        return taken


@pytest.fixture
def traffic():
    handler, level = Traffic(), server.logger.level
    server.logger.addHandler(handler)
    server.logger.setLevel(logging.DEBUG)
    yield handler
    server.logger.removeHandler(handler)
    server.logger.setLevel(level)


def publish_amended(world, folder):
    """Publish 1.1: the release 1.0 with other labels and thresholds."""
    old = world.bundles / "m-1.0.edgekit"
    folder.mkdir()
    draft = amend_bundle(
        read_bundle(old), version="1.1", folder=folder, labels=("ant", "bee", "fly"), thresholds={"bee": 0.9, "ant": 0.9}
    )
    out = world.bundles / "m-1.1.edgekit"
    write_bundle(draft.manifest, draft.blobs, signer=world.signer, out=out)
    worlds.publish(world.folder, out, keys=[world.signer.public_key], allows_contract_change=True)


def publish_sealed(world, recipient):
    """Publish 1.0, sealed."""
    model, weights = build_model(1)
    blobs = {(0, "model"): model, (0, "golden"): build_golden(weights)}
    draft = Draft(build_manifest(version="1.0", blobs=blobs), {digest_bytes(data): data for data in blobs.values()})
    sealed = seal_models(draft, [recipient])
    out = world.bundles / "m-1.0.edgekit"
    write_bundle(sealed.manifest, sealed.blobs, signer=world.signer, out=out)
    worlds.publish(world.folder, out, keys=[world.signer.public_key])


@pytest.mark.parametrize("is_sealed", [False, True], ids=["open", "sealed"])
def test_device_with_the_old_release_fetches_no_blob(world, make_agent, tmp_path, traffic, *, is_sealed, capsys):
    settings = {}
    if is_sealed:
        recipient = make_identity(tmp_path / "d.age", tmp_path / "d.age.pub")
        publish_sealed(world, recipient)
        settings = {"age_identity": str(tmp_path / "d.age")}
    else:
        world.publish("1.0", seed=1)
    agent = make_agent(**settings).start()
    agent.wait_served("1.0")
    digest = agent.infer([0, 0, 0, 0])[1]["edgekit-model-digest"]
    first = traffic.take()
    assert sum("/blobs/" in path for path in first) == 2  # model and golden samples: what is counted is seen
    publish_amended(world, tmp_path / "amended")
    agent.wait_served("1.1")
    second = traffic.take()
    assert [path for path in second if "/blobs/" in path] == []
    assert sum("manifest.json" in path for path in second) == 1
    assert all(path.startswith(("/metadata/", "/targets/")) for path in second)
    assert agent.infer([0, 0, 0, 0])[1]["edgekit-model-digest"] == digest
    parameters = agent.get("/v2/models/m")[1]["parameters"]
    assert parameters["labels"] == ["ant", "bee", "fly"]
    assert parameters["thresholds"] == {"ant": 0.9, "bee": 0.9}
    if not is_sealed:
        np.savez(tmp_path / "data.npz", x=np.zeros((3, 4), np.float32))  # all scores alike: nothing reaches 0.9
        arguments = [str(tmp_path / "data.npz"), "--agent", f"http://127.0.0.1:{agent.port}", "--model", "m"]
        assert main(["predict", *arguments]) == 0
        shown = capsys.readouterr().out
        assert "(below threshold 0.9)" in shown
        assert "3 below the threshold" in shown
