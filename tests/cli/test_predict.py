"""``edgekit predict``: a real model file, a real bundle, and a server that speaks the agent's own protocol."""

from __future__ import annotations

import csv
import datetime as dt
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from edgekit.cli import main as cli_main
from edgekit.cli.predict import PredictionReport, softmax
from edgekit.schema.base import decode_json, encode_json

NAMES = "top,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,boot"
DIGEST = "sha256:" + "ab" * 32


def run(capsys, *arguments):
    code = cli_main.main(["predict", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def model(sample_dir):
    return sample_dir / "model.onnx"


@pytest.fixture(scope="module")
def field(sample_dir, tmp_path_factory):
    """The sample's field data, without the names of its classes."""
    path = tmp_path_factory.mktemp("field") / "field.npz"
    with np.load(sample_dir / "field.npz") as arrays:
        np.savez(path, image=arrays["image"][:200], labels=arrays["labels"][:200])
    return path


# --- model files ------------------------------------------------------------------------------------------------------------


def test_file_prints_a_table_and_the_accuracy(capsys, model, field):
    code, out, _err = run(capsys, model, field, "--limit", "40", "--labels", NAMES)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["index", "predicted", "confidence", "expected"]
    assert len(lines) == 1 + 10 + 1 + 1
    assert lines[1].split()[1] in NAMES.split(",")
    assert 0 < float(lines[1].split()[2]) <= 1
    assert "30 more" in lines[-2]
    assert "40 samples, top1 0." in lines[-1]


def test_json_is_the_record_and_nothing_else(capsys, model, field, sample_dir):
    code, out, _err = run(capsys, model, field, "--limit", "50", "--json")
    report = decode_json(out, PredictionReport)
    assert code == 0
    assert (report.samples, report.task, report.metric) == (50, "classification", "top1")
    right = sum(one.label == one.expected for one in report.predictions)
    assert report.score == pytest.approx(right / 50)
    assert report.score > 0.6
    for one in report.predictions:
        assert one.class_index == int(np.argmax(one.values))
        assert one.confidence == pytest.approx(softmax(np.array([one.values]))[0, one.class_index])


def test_every_out_format_holds_the_same(capsys, model, field, tmp_path):
    for suffix in ("json", "npz", "csv", "parquet"):
        code, _out, err = run(capsys, model, field, "--limit", "12", "--out", tmp_path / f"p.{suffix}")
        assert code == 0, err
    report = decode_json((tmp_path / "p.json").read_bytes(), PredictionReport)
    classes = [one.class_index for one in report.predictions]
    with np.load(tmp_path / "p.npz", allow_pickle=False) as arrays:
        assert arrays["predicted"].tolist() == classes
        assert [str(label) for label in arrays["labels"]] == [one.expected for one in report.predictions]
        assert arrays["logits"].argmax(axis=1).tolist() == classes
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["class_index"]) for row in rows] == classes
    assert float(rows[3]["value_2"]) == pytest.approx(report.predictions[3].values[2])
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "p.parquet").column("class_index").to_pylist() == classes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "p.json", "p.npz", "p.parquet"]


def test_data_without_labels_has_no_score(capsys, model, field, tmp_path):
    with np.load(field) as arrays:
        np.savez(tmp_path / "d.npz", image=arrays["image"][:3])
    code, out, _err = run(capsys, model, tmp_path / "d.npz")
    assert code == 0
    assert out.splitlines()[0].split() == ["index", "predicted", "confidence"]
    assert out.splitlines()[-1].endswith("3 samples")


def test_labels_that_do_not_fit_are_said_and_do_not_stop(capsys, model, field, tmp_path):
    with np.load(field) as arrays:
        np.savez(tmp_path / "d.npz", image=arrays["image"][:3], labels=np.array([0, 1, 77]))
    code, out, err = run(capsys, model, tmp_path / "d.npz", "--json")
    assert code == 0
    assert decode_json(out, PredictionReport).score is None
    assert "label 77" in err


def test_label_names_come_from_a_file(capsys, model, field, tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join(NAMES.split(",")))
    code, out, _err = run(capsys, model, field, "--limit", "3", "--labels", tmp_path / "labels.txt", "--json")
    assert code == 0
    assert {one.label for one in decode_json(out, PredictionReport).predictions} <= set(NAMES.split(","))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{model}"], "data is missing"),
        (["{model}", "{field}", "--model", "x"], "--model goes with --agent"),
        (["m", "{field}", "--model", "x", "--agent", "http://127.0.0.1:1"], "name one model"),
        (["{model}", "{field}", "--labels", "a,b"], "2 names"),
        (["{model}", "{field}", "--out", "p.xlsx"], ".npz, .csv"),
        (["{model}", "{field}", "--limit", "0"], "limit of 0"),
        (["absent.onnx", "{field}"], "no such file"),
        (["{model}", "absent.npz"], "no such file"),
        (["{field}", "--agent", "ftp://x", "--model", "m"], "http://HOST:PORT"),
    ],
)
def test_usage_errors(capsys, model, field, arguments, text):
    code, out, err = run(capsys, *[one.format(model=model, field=field) for one in arguments])
    assert code == 2
    assert out == ""
    assert text in err


def test_wrong_data_is_a_data_error(capsys, model, tmp_path):
    np.savez(tmp_path / "d.npz", image=np.zeros((3, 28, 28), np.float32))
    code, _out, err = run(capsys, model, tmp_path / "d.npz")
    assert code == 2
    assert "[samples, 1, 28, 28]" in err
    assert "array[:, None]" in err


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[0.0, 0.0]], [[0.5, 0.5]]),
        ([[1000.0, -1000.0]], [[1.0, 0.0]]),
        ([[0.25, 0.75]], [[0.25, 0.75]]),
        ([[0.25, 0.75], [2.0, 2.0]], [[0.3775406688, 0.6224593312], [0.5, 0.5]]),
    ],
)
def test_softmax_only_where_needed(scores, expected):
    np.testing.assert_allclose(softmax(np.array(scores)), expected, atol=1e-9)


# --- bundles ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(model, sample_dir, tmp_path):
    from edgekit.bundle.writer import pack_bundle
    from edgekit.dataset.contract import infer_contract
    from edgekit.dataset.load import load_dataset
    from edgekit.runtime.registry import open_session
    from edgekit.runtime.session import SessionOptions
    from edgekit.schema.artifact import ModelArtifact
    from edgekit.schema.candidate import Candidate, SourceModel, Verdict
    from edgekit.schema.digest import digest_file
    from edgekit.trust.signer import generate_signer

    folder = tmp_path / "optimized"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model.read_bytes())
    session = open_session(model)
    data = load_dataset(str(sample_dir / "calibration.npz"), session.inputs, limit=20)
    digest, size = digest_file(model), model.stat().st_size
    candidate = Candidate(
        name="fp32",
        target="host",
        target_digest=DIGEST,
        source=SourceModel(spec="model.onnx", kind="onnx", digest=digest, size_bytes=size),
        contract=infer_contract(data, session.inputs, session.outputs, tuple(NAMES.split(","))),
        verdict=Verdict(status="chosen", is_budget_met=True, reason="the only one"),
        seed=0,
        created_at=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        edgekit_version="0",
        artifact=ModelArtifact(
            path="model.onnx", digest=digest, size_bytes=size, format="onnx", inputs=session.inputs, outputs=session.outputs
        ),
    )
    (folder / "candidate.json").write_bytes(encode_json(candidate))
    out = tmp_path / "fashion-1.0.0.edgekit"

    def open_with(path, *, threads, is_optimized):
        return open_session(path, options=SessionOptions(threads=threads, is_optimized=is_optimized))

    pack_bundle(
        folder,
        out,
        name="fashion",
        version="1.0.0",
        signer=generate_signer(),
        open_session=open_with,
        data=data,
        golden_samples=2,
    )
    return out


def test_bundle_answers_as_its_model_and_names_its_classes(capsys, bundle, model, field):
    code, out, err = run(capsys, bundle, field, "--limit", "20", "--json")
    assert code == 0, err
    report = decode_json(out, PredictionReport)
    assert (report.model, report.version) == ("fashion", "1.0.0")
    assert {one.label for one in report.predictions} <= set(NAMES.split(","))
    _code, direct, _err = run(capsys, model, field, "--limit", "20", "--json")
    plain = decode_json(direct, PredictionReport)
    assert [one.values for one in plain.predictions] == [one.values for one in report.predictions]
    assert plain.model_digest == report.model_digest


def test_folder_of_optimize_gives_its_class_names(capsys, bundle, field):
    code, out, _err = run(capsys, bundle.parent / "optimized", field, "--limit", "5", "--json")
    assert code == 0
    assert {one.label for one in decode_json(out, PredictionReport).predictions} <= set(NAMES.split(","))


def test_damaged_bundle_is_refused(capsys, bundle, field):
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    bundle.write_bytes(data)
    code, out, _err = run(capsys, bundle, field)
    assert code in (3, 4)
    assert out == ""


# --- a running agent --------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """The inference routes of an agent, with the agent's own codec and a real session."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        from edgekit.agent.protocol import describe_tensors

        if self.path != "/v2/models/fashion":
            return self._send(404, {"error": f"model {self.path}: not served here", "code": "model.unknown"})
        session = self.server.session
        described = {
            "name": "fashion",
            "versions": ["1.0.0"],
            "inputs": describe_tensors(session.inputs),
            "outputs": describe_tensors(session.outputs),
            "parameters": {"model_digest": DIGEST, "labels": NAMES.split(",")},
        }
        return self._send(200, self.server.description or described)

    def do_POST(self):
        from edgekit.agent.protocol import decode_request, encode_answer

        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v2/repository/index":
            return self._send(200, [{"name": name, "state": "READY"} for name in self.server.names])
        request = decode_request(body, int(self.headers["Inference-Header-Content-Length"]))
        self.server.batches.append(len(request.feeds["image"]))
        if self.server.refusal:
            return self._send(*self.server.refusal)
        outputs = self.server.session.run(request.feeds)
        version = "1.0.0" if len(self.server.batches) == 1 else self.server.later_version
        body, length = encode_answer(
            request, outputs, model="fashion", version=version, model_digest=f"{DIGEST[:-1]}{version[0]}"
        )
        return self._send(200, body, length)

    def _send(self, status, body, json_length=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if json_length is not None:
            self.send_header("Inference-Header-Content-Length", str(json_length))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def agent(model):
    from edgekit.runtime.registry import open_session

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.session, server.batches, server.refusal, server.description = open_session(model), [], None, None
    server.later_version, server.names = "1.0.0", ["fashion"]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def url_of(agent):
    return f"http://127.0.0.1:{agent.server_port}"


def test_agent_answers_as_the_file(capsys, agent, model, field, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    code, out, err = run(capsys, field, "--agent", url_of(agent), "--model", "fashion", "--limit", "50", "--json")
    assert code == 0, err
    report = decode_json(out, PredictionReport)
    assert (report.model, report.version, report.samples) == ("fashion", "1.0.0", 50)
    assert sum(agent.batches) == 50
    assert len(agent.batches) > 1
    _code, direct, _err = run(capsys, model, field, "--limit", "50", "--labels", NAMES, "--json")
    plain = decode_json(direct, PredictionReport)
    assert plain.score == report.score
    assert [one.label for one in plain.predictions] == [one.label for one in report.predictions]
    for here, there in zip(plain.predictions, report.predictions, strict=True):
        assert here.values == pytest.approx(there.values, abs=1e-4)


def test_agent_model_may_stand_in_the_place_of_the_file(capsys, agent, field):
    code, out, _err = run(capsys, "fashion", field, "--agent", url_of(agent), "--limit", "3")
    assert code == 0
    assert "fashion 1.0.0: 3 samples" in out


def test_agents_only_model_needs_no_name(capsys, agent, field):
    code, out, _err = run(capsys, field, "--agent", url_of(agent), "--limit", "3")
    assert code == 0
    assert "fashion 1.0.0: 3 samples" in out
    agent.names = ["fashion", "kws"]
    code, out, err = run(capsys, field, "--agent", url_of(agent), "--limit", "3")
    assert (code, out) == (2, "")
    assert "fashion, kws" in err
    assert "--model" in err


def test_model_changed_meanwhile_is_said(capsys, agent, field):
    agent.later_version = "2.0.0"
    code, out, err = run(capsys, "fashion", field, "--agent", url_of(agent), "--limit", "50", "--json")
    assert code == 0
    assert "changed its model meanwhile: 1.0.0, 2.0.0" in err
    assert decode_json(out, PredictionReport).version == "2.0.0"


def test_agent_without_that_model(capsys, agent, field):
    code, _out, err = run(capsys, "other", field, "--agent", url_of(agent))
    assert code == 2
    assert "not served here" in err


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        ((400, {"error": "input image: no", "code": "data.shape"}), (2, "input image: no")),
        ((503, {"error": "no model yet", "code": "agent.no_model"}), (3, "no model yet")),
        ((500, b"<html>"), (3, "HTTP 500")),
        ((200, b"not json"), (3, "not an inference answer")),
        ((200, {"outputs": [{"name": "y"}]}), (3, "not an inference answer")),
        ((200, [1]), (3, "not an inference answer")),
    ],
)
def test_agent_refuses_or_talks_nonsense(capsys, agent, field, refusal, expected):
    agent.refusal = refusal
    code, text = expected
    got, out, err = run(capsys, "fashion", field, "--agent", url_of(agent), "--limit", "1")
    assert (got, out) == (code, "")
    assert text in err


def test_agent_describes_nonsense(capsys, agent, field):
    agent.description = {"name": "fashion", "inputs": [{"name": "image", "shape": [1], "datatype": "BF16"}], "outputs": []}
    got, _out, err = run(capsys, "fashion", field, "--agent", url_of(agent))
    assert got == 3
    assert "not complete" in err


def test_agent_that_is_not_there(capsys, agent, field):
    url = url_of(agent)
    agent.shutdown()
    agent.server_close()
    code, _out, err = run(capsys, "fashion", field, "--agent", url)
    assert code == 3
    assert "edgekit agent run" in err
