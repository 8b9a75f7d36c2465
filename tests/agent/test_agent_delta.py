"""Updates by delta on a running agent: few bytes, never wrong ones, and no whole download over a metered link."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.writer import write_bundle
from edgekit.repository.deltas import make_deltas
from edgekit.repository.publishing import publish
from edgekit.schema.digest import digest_bytes
from edgekit.schema.release import DeltaRef
from tests.agent.world import build_golden, build_manifest, wait_for

SIZE = 160


def big_model(seed, *, noise=0.0):
    """y = (x W) V with 100 kB of weights that drift a little."""
    base, drift = np.random.default_rng(seed), np.random.default_rng(seed + 9)
    first = base.normal(size=(4, SIZE * SIZE)).astype(np.float32) / SIZE
    second = base.normal(size=(SIZE * SIZE, 3)).astype(np.float32) / SIZE
    first[0] += (noise * drift.normal(size=first.shape[1])).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "big",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(first, "w"), numpy_helper.from_array(second, "v")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString(), first @ second


def put(world, version, *, noise, maker=make_deltas):
    model, weights = big_model(5, noise=noise)
    blobs = {(0, "model"): model, (0, "golden"): build_golden(weights)}
    manifest = build_manifest(version=version, blobs=blobs)
    out = world.bundles / f"m-{version}.edgekit"
    write_bundle(manifest, {digest_bytes(data): data for data in blobs.values()}, signer=world.signer, out=out)
    return publish(world.folder, out, keys=[world.signer.public_key], delta_maker=maker), model


def blob_file(world, digest):
    return world.folder / "blobs" / "sha256" / digest.removeprefix("sha256:")


def test_update_by_delta_needs_no_whole_model(world, make_agent):
    put(world, "1.0", noise=0.0)
    agent = make_agent(metered=True, metered_full=True).start()
    agent.wait_served("1.0")
    release, model = put(world, "2.0", noise=0.01)
    (delta,) = release.info.deltas
    assert delta.size_bytes < 0.4 * len(model)
    blob_file(world, digest_bytes(model)).unlink()  # nobody can fetch the whole any more
    agent.wait_served("2.0")
    assert agent.logged("event=delta_applied")
    assert list((agent.state_dir / "parts").iterdir()) == []


@pytest.mark.fault("F25")
def test_broken_delta_is_remembered_and_the_whole_is_fetched(world, make_agent):
    """The owner's tool was broken: what it signed leads nowhere."""
    _, old = put(world, "1.0", noise=0.0)
    agent = make_agent().start()
    agent.wait_served("1.0")
    content = b"EKDELTA1" + bytes(500)

    def broken_maker(folder, manifest, releases, *, channel):
        digest = digest_bytes(content)
        blob_file(world, digest).write_bytes(content)
        target = manifest.variants[0].model
        return (DeltaRef(base=digest_bytes(old), target=target, digest=digest, size_bytes=len(content), codec="tsub1"),)

    put(world, "2.0", noise=0.01, maker=broken_maker)
    agent.wait_served("2.0")
    assert agent.status()["state"]["failed_deltas"] == [digest_bytes(content)]
    assert agent.logged("event=delta_failed")
    assert agent.status()["state"]["refusals"] == []


@pytest.mark.fault("F25")
@pytest.mark.parametrize("is_allowed", [False, True])
def test_metered_link_and_no_usable_delta(world, make_agent, is_allowed):
    put(world, "1.0", noise=0.0)
    agent = make_agent().start()
    agent.wait_served("1.0")
    agent.stop()
    text = f"metered = true\nmetered_limit_bytes = 1000\nmetered_full = {str(is_allowed).lower()}\n"
    agent.config.write_text(text + agent.config.read_text())
    put(world, "2.0", noise=0.01, maker=None)
    agent.start()
    if is_allowed:
        agent.wait_served("2.0")
        return
    wait_for(lambda: agent.logged("device.metered"), what="the refusal")
    assert agent.served() == "1.0"
    assert agent.status()["state"]["refusals"] == []
