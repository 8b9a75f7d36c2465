"""The contract on the device: each answer says what was done to its input, counters add up, many violations are one event."""

from __future__ import annotations

import json

import msgspec
import pytest

from edgekit.agent.link import Figures
from edgekit.agent.violations import LEAST_SAMPLES, ViolationWatch
from edgekit.bundle.writer import write_bundle
from edgekit.repository.publishing import publish
from edgekit.schema.contract import ColumnSpec, Contract
from edgekit.schema.digest import digest_bytes
from tests.agent.world import build_golden, build_manifest, build_model, wait_for

BARE = Contract(inputs=(), outputs=())
STRICT = Contract(inputs=(), outputs=(), violation_share=0.05)


def figures(samples, digest="sha256:a", **verdicts):
    return Figures(model_digest=digest, samples=samples, verdicts={key.replace("_", " ", 1): n for key, n in verdicts.items()})


def test_many_violations_are_one_event():
    watch = ViolationWatch()
    assert watch.judge(figures(100, clip_x=10), BARE) is None
    found = watch.judge(figures(100, clip_x=11, impute_y=3), BARE)
    assert (found.name, found.action, found.share, found.limit, found.samples) == ("x", "clip", 0.11, 0.1, 100)
    assert "x: 11.0% of 100 samples clipped" in found.text
    assert watch.judge(figures(100, clip_x=90), BARE) is None, "it is known already"
    assert watch.judge(figures(100, clip_x=6), BARE) is None
    assert watch.judge(figures(100, clip_x=90), BARE) is None, "it did not fall below half the limit"
    assert watch.judge(figures(100, clip_x=5), BARE) is None
    assert watch.judge(figures(100, clip_x=90), BARE) is not None


def test_refused_samples_count_among_all():
    found = ViolationWatch().judge(figures(80, reject_x=20), BARE)
    assert (found.share, found.samples) == (0.2, 100)


def test_passed_values_count_where_a_share_is_declared():
    assert ViolationWatch().judge(figures(100, pass_x=90), BARE) is None
    assert ViolationWatch().judge(figures(100, pass_x=6), STRICT).share == 0.06


def test_few_samples_are_put_together():
    watch = ViolationWatch()
    for _ in range(LEAST_SAMPLES // 10 - 1):
        assert watch.judge(figures(10, clip_x=5), BARE) is None
    assert watch.judge(figures(10, clip_x=5), BARE).samples == LEAST_SAMPLES
    assert watch.judge(figures(100, digest="sha256:b", clip_x=50), BARE) is not None, "models are judged apart"


@pytest.fixture
def guarded(world):
    """A release whose second input column is imputed, the others clipped."""
    model, weights = build_model(1)
    blobs = {(0, "model"): model, (0, "golden"): build_golden(weights)}
    manifest = build_manifest(version="1.0", blobs=blobs)
    columns = (
        ColumnSpec(name="a"),
        ColumnSpec(name="b", missing="impute", fill=0.25, missing_value=-999),
        ColumnSpec(name="c", out_of_range="reject"),
        ColumnSpec(name="d"),
    )
    spec = msgspec.structs.replace(manifest.contract.inputs[0], out_of_range="clip", columns=columns)
    contract = msgspec.structs.replace(manifest.contract, inputs=(spec,), violation_share=0.3)
    out = world.bundles / "m-1.0.edgekit"
    manifest = msgspec.structs.replace(manifest, contract=contract)
    write_bundle(manifest, {digest_bytes(data): data for data in blobs.values()}, signer=world.signer, out=out)
    publish(world.folder, out, keys=[world.signer.public_key])
    return weights


def test_answer_says_what_was_done_to_its_input(guarded, make_agent):
    agent = make_agent(window_s=0.5).start()
    agent.wait_served("1.0")
    status, _headers, body = agent.infer([0.1, 0.2, 0.3, 0.4])
    assert status == 200
    assert "input_verdicts" not in body["parameters"]
    right = agent.infer([0.1, 0.25, 0.3, 1.0])[2]["outputs"]
    status, _headers, body = agent.infer([0.1, -999.0, 0.3, 77.0])
    assert status == 200
    assert body["outputs"] == right
    verdicts = body["parameters"]["input_verdicts"]
    verdicts = json.loads(verdicts) if isinstance(verdicts, str) else verdicts
    assert verdicts == ["x.b: 1 missing, imputed", "x.d: 1 out of range, clipped"]
    status, _headers, body = agent.infer([0.1, 0.2, 5.0, 0.4])
    assert (status, body["code"]) == (400, "data.out_of_range")
    assert 'input "x", column "c"' in body["error"]
    for _ in range(30):
        agent.infer([0.1, 0.2, 0.3, 77.0])
    wait_for(lambda: agent.logged("contract_violated"), what="the event")
