"""Sensor streams on the device: a real model behind the real service, and the agent as a process over a swap."""

from __future__ import annotations

import asyncio
import http.client
import json

import msgspec
import numpy as np
import pytest

from edgekit.agent import streams as streams_module
from edgekit.agent.http import Request
from edgekit.agent.link import Model
from edgekit.agent.meter import Meter
from edgekit.agent.protocol import DATATYPES
from edgekit.agent.serve import Predictor, Service
from edgekit.bundle.writer import write_bundle
from edgekit.evaluation.feature_parity import make_golden_features
from edgekit.features.compute import compute
from edgekit.features.program import Program
from edgekit.repository.publishing import publish
from edgekit.runtime.registry import open_session
from edgekit.schema.base import decode_msgpack, encode_msgpack
from edgekit.schema.digest import digest_bytes
from edgekit.schema.features import FeatureSet, StreamColumn, StreamSpec, WindowFeatures, WindowPart, WindowSpec
from edgekit.schema.manifest import GoldenSet
from tests.agent.world import build_golden, build_manifest, build_model
from tests.features.declared import samples

COLUMNS = ("t", "ax", "ay")


def declared(**window):
    return FeatureSet(
        stream=StreamSpec(
            name="motor", rate_hz=100, time="t", columns=(StreamColumn(name="ax", unit="g"), StreamColumn(name="ay", unit="g"))
        ),
        windows=(WindowSpec(name="w", length=50, hop=25, **window),),
        inputs=(WindowFeatures(name="x", parts=(WindowPart(window="w", aggregates=("mean", "rms")),)),),
    )


def with_features(version, seed, features, **rules):
    """A manifest with its blobs: the model of a seed, fed by a stream."""
    model, weights = build_model(seed)

    def run(feeds):
        return {"y": feeds["x"] @ weights}

    golden = decode_msgpack(build_golden(weights), GoldenSet)
    made = make_golden_features(Program(features), samples(300), run, source="test")
    blobs = {(0, "model"): model, (0, "golden"): encode_msgpack(msgspec.structs.replace(golden, features=made))}
    manifest = build_manifest(version=version, blobs=blobs)
    spec = msgspec.structs.replace(manifest.contract.inputs[0], **rules)
    contract = msgspec.structs.replace(manifest.contract, inputs=(spec,))
    return msgspec.structs.replace(manifest, features=features, contract=contract), blobs


@pytest.fixture
def make_service(tmp_path):
    sessions = []

    def make(*releases, golden_ms=0.1):
        predictors = {}
        for number, (manifest, blobs) in enumerate(releases):
            path = tmp_path / f"{number}.onnx"
            path.write_bytes(blobs[0, "model"])
            sessions.append(open_session(path))
            model = Model(manifest=manifest, variant=manifest.variants[0], blob_dir=str(tmp_path))
            predictors[manifest.name] = Predictor(model, sessions[-1], Meter(), golden_ms=golden_ms)
        return Service(None, predictors)

    yield make
    for session in sessions:
        session.close()


def ask(service, body, path="/v2/streams/motor", *, method="POST", headers=None):
    async def handle():
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = service.handle(Request(method, path, headers or {}, data, 0.0, is_keep_alive=True))
        return answer if not hasattr(answer, "__await__") else await answer

    answer = asyncio.run(handle())
    return answer.status, json.loads(answer.body)


def rows(columns, start=0, stop=None):
    part = [columns[name][start:stop].tolist() for name in COLUMNS]
    return {"columns": list(COLUMNS), "rows": [list(row) for row in zip(*part, strict=True)]}


@pytest.mark.parametrize("golden_ms", [0.1, 100.0], ids=["in the loop", "in a thread"])
def test_windows_are_answered_as_in_batch(make_service, golden_ms):
    service = make_service(with_features("1.0", 1, declared(), out_of_range="clip"), golden_ms=golden_ms)
    columns, windows = samples(400), []
    for start in range(0, 400, 37):
        status, body = ask(service, rows(columns, start, start + 37))
        assert (status, body["stream"], body["sensor"]) == (200, "motor", "")
        windows += body["windows"]
    table = compute(columns, declared())
    weights = build_model(1)[1]
    assert [window["end"] for window in windows] == table.end_s.tolist()
    expected = table.inputs["x"].clip(-1, 1) @ weights
    assert np.allclose([window["outputs"][0]["data"] for window in windows], expected, atol=1e-5)
    assert len({window["parameters"]["prediction_id"] for window in windows}) == len(windows) == len(table)
    clipped = (table.inputs["x"] > 1).any(axis=1)
    assert [("input_verdicts" in window["parameters"]) for window in windows] == clipped.tolist()
    assert body["counters"]["m"]["samples"] == 400
    figures = service.predictors["m"].meter.take()
    assert (figures.requests, figures.samples, figures.out_of_range) == (len(table), len(table), int(clipped.sum()))


def test_binary_columns_give_the_same_bits(make_service):
    features = declared()
    listed, binary = make_service(with_features("1.0", 1, features)), make_service(with_features("1.0", 1, features))
    columns = samples(120)
    blobs = [columns[name].astype("<f8").tobytes() for name in COLUMNS]
    datatype = next(name for name, dtype in DATATYPES.items() if dtype == "float64")
    inputs = [
        {"name": name, "shape": [120], "datatype": datatype, "parameters": {"binary_data_size": len(blob)}}
        for name, blob in zip(COLUMNS, blobs, strict=True)
    ]
    head = json.dumps({"inputs": inputs}).encode()
    sized = {b"inference-header-content-length": str(len(head)).encode()}
    status, got = ask(binary, head + b"".join(blobs), headers=sized)
    assert status == 200
    assert [w["outputs"] for w in got["windows"]] == [w["outputs"] for w in ask(listed, rows(columns))[1]["windows"]]
    assert len(got["windows"]) == 3


def test_sensors_are_streams_of_their_own(make_service):
    service = make_service(with_features("1.0", 1, declared()))
    columns = samples(60)
    for name in ("a", "b"):
        status, body = ask(service, rows(columns, 0, 40), f"/v2/streams/motor/{name}")
        assert (status, body["sensor"], body["windows"]) == (200, name, [])
    assert len(ask(service, rows(columns, 40), "/v2/streams/motor/b")[1]["windows"]) == 1
    status, body = ask(service, b"", "/v2/streams", method="GET")
    assert (status, body["streams"]) == (200, [{"name": "motor", "model_name": "m", "columns": list(COLUMNS), "sensors": 2}])


def test_number_of_streams_is_bounded(make_service, monkeypatch):
    monkeypatch.setattr(streams_module, "MAX_STREAMS", 2)
    service = make_service(with_features("1.0", 1, declared()))
    for name in "abac":
        body = ask(service, rows(samples(10)), f"/v2/streams/motor/{name}")[1]
    assert list(service.streams._models[0].streams) == ["a", "c"], "the one that was quiet for longest made room"
    assert body["counters"]["m"]["evicted"] == 1


def test_gaps_and_missing_values_are_counted(make_service):
    service = make_service(with_features("1.0", 1, declared()))
    columns = samples(100)
    given = rows(columns, 0, 60)
    given["rows"][55][1] = None
    given["rows"] += rows(columns, 30, 31)["rows"] + rows(columns, 60)["rows"]
    status, body = ask(service, given)
    assert status == 200
    assert [round(window["end"], 2) for window in body["windows"]] == [1000.5]
    counters = body["counters"]["m"]
    assert (counters["incomplete"], counters["duplicates"], counters["late"]) == (3, 1, 0)


def test_contract_refuses_one_window_not_the_stream(make_service):
    service = make_service(with_features("1.0", 1, declared(), out_of_range="reject", maximum=0.9))
    columns = samples(100)
    columns["ay"][60:] = 50.0
    status, body = ask(service, rows(columns))
    assert status == 200
    codes = [window.get("code", "") for window in body["windows"]]
    assert codes[-1] == "data.out_of_range"
    assert len(codes) == 3
    figures = service.predictors["m"].meter.take()
    assert figures.rejected == sum(code != "" for code in codes)
    assert figures.verdicts == {"reject x": figures.rejected}


@pytest.mark.parametrize(
    ("body", "path", "status", "code"),
    [
        ({"columns": ["t"], "rows": [[1]]}, "/v2/streams/pump", 404, "stream.unknown"),
        ({"columns": ["t", "ax"], "rows": [[1, 2]]}, "/v2/streams/motor", 400, "data.missing_input"),
        ({"columns": ["t", "ax", "ay"], "rows": [[1, 2]]}, "/v2/streams/motor", 400, "request.malformed"),
        ({"rows": []}, "/v2/streams/motor", 400, "request.malformed"),
        (b"{", "/v2/streams/motor", 400, "request.malformed"),
        ({"columns": ["t", "ax", "ay"], "rows": [["1", 2, 3]]}, "/v2/streams/motor", 400, "request.malformed"),
        ({"columns": ["t", "ax", "ay"], "rows": []}, "/v2/streams/motor/a%20b", 400, "stream.sensor"),
        ({}, "/v2/streams/motor/a/b", 404, "http.not_found"),
    ],
)
def test_samples_that_cannot_be_taken(make_service, body, path, status, code):
    service = make_service(with_features("1.0", 1, declared()))
    got, answer = ask(service, body, path)
    assert (got, answer["code"]) == (status, code)


def test_push_that_would_keep_others_waiting(make_service):
    service = make_service(with_features("1.0", 1, declared()))
    columns = {name: np.resize(array, 512 * 25 + 1) for name, array in samples(100).items()}
    status, body = ask(service, rows(columns))
    assert (status, body["code"]) == (400, "stream.too_long")
    assert service.streams._models[0].streams == {}


def test_raw_columns_in_a_request(make_service):
    from edgekit.schema.features import TableColumn, TableFeatures

    raw = tuple(TableColumn(name=name, steps=("scale(0.1)",)) for name in ("a", "b", "c"))
    features = FeatureSet(inputs=(TableFeatures(name="x", columns=(*raw, TableColumn(name="d", steps=("log1p",)))),))
    model, weights = build_model(1)
    manifest = build_manifest(version="1", blobs={(0, "model"): model, (0, "golden"): build_golden(weights)})
    service = make_service((msgspec.structs.replace(manifest, features=features), {(0, "model"): model}))
    values = {"a": [1.0, 2.0], "b": [3.0, 4.0], "c": [5.0, 6.0], "d": [0.0, 1.0]}
    inputs = [{"name": name, "shape": [2, 1], "datatype": "FP64", "data": data} for name, data in values.items()]
    status, body = ask(service, {"inputs": inputs}, "/v2/models/m/infer")
    x = np.array([[0.1, 0.3, 0.5, 0.0], [0.2, 0.4, 0.6, np.log1p(1.0)]], np.float32)
    assert status == 200, body
    assert np.allclose(np.reshape(body["outputs"][0]["data"], (2, 3)), x @ weights, atol=1e-5)
    ready = {"inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "data": x.ravel().tolist()}]}
    assert ask(service, ready, "/v2/models/m/infer")[1]["outputs"] == body["outputs"]


# --- the agent as a process -------------------------------------------------------------------------------------------------


def publish_streamed(world, version, seed, *, broken=False):
    manifest, blobs = with_features(version, seed, declared(), out_of_range="clip")
    if broken:
        other = msgspec.structs.replace(manifest.features.windows[0], length=49)
        manifest = msgspec.structs.replace(manifest, features=msgspec.structs.replace(manifest.features, windows=(other,)))
    out = world.bundles / f"m-{version}.edgekit"
    write_bundle(manifest, {digest_bytes(data): data for data in blobs.values()}, signer=world.signer, out=out)
    publish(world.folder, out, keys=[world.signer.public_key])


def push(agent, columns, start, stop):
    connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=10)
    connection.request("POST", "/v2/streams/motor/left", json.dumps(rows(columns, start, stop)))
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    assert answer.status == 200, body
    return body


def test_swap_of_the_model_loses_at_most_one_window_and_says_so(world, make_agent):
    publish_streamed(world, "1.0", 1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    columns = samples(600)
    first = push(agent, columns, 0, 110)
    assert len(first["windows"]) == 3
    publish_streamed(world, "2.0", 2)
    agent.wait_served("2.0")
    second = push(agent, columns, 110, 600)
    ends = [round((window["end"] - 1000) * 100) for window in (*first["windows"], *second["windows"])]
    assert ends == [50, 75, 100, *range(175, 601, 25)], "125 and 150 had begun: one length of the window"
    assert second["counters"]["m"]["incomplete"] == 2
    digests = {window["parameters"]["model_digest"] for window in second["windows"]}
    assert digests == {digest_bytes(build_model(2)[0])}


def test_release_whose_features_are_computed_otherwise_is_not_served(world, make_agent):
    publish_streamed(world, "1.0", 1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    publish_streamed(world, "2.0", 2, broken=True)
    agent.wait_status(lambda body: "selftest.features" in json.dumps(body), what="the refusal")
    assert agent.served() == "1.0"
