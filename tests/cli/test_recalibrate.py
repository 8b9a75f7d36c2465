"""``edgekit recalibrate`` whole: a real repository, a real compile, a real fleet server with real samples.

The model is linear on four inputs, of which the last is a switch that was off in the old data. In the field it is on, and moves
the first input with it: the model that serves is wrong there, and one that learned from the field is right on both.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import uvicorn
from onnx import numpy_helper
from sqlalchemy import insert

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fleet"))
from fleet_world import birth, free_port, wait_until
from releases import CONTRACT, linear_model

from edgekit.bundle.reader import read_bundle
from edgekit.cli import recalibrate_stages
from edgekit.cli.main import main
from edgekit.cli.recalibrate_data import load_field
from edgekit.compiler import pipeline
from edgekit.dataset.field import split_holdout
from edgekit.fleet import assembly, tables
from edgekit.fleet.audit import Audit
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.server import make_app
from edgekit.fleet.store import Store
from edgekit.fleet.work.orders import Work
from edgekit.fleet.writing import Received
from edgekit.schema.base import decode_msgpack
from edgekit.schema.manifest import GoldenSet
from edgekit.schema.message import InputSample, Label, SampleTensor

CLASSES = np.array(["a", "b", "c"])
SHIFT = 2.5
TRAIN = '''
import numpy as np
import onnx
from onnx import numpy_helper


def train(lesson):
    """Softmax regression on the old and the field's samples."""
    x = np.concatenate([lesson.old.inputs["x"], lesson.field.inputs["x"]])
    labels = np.concatenate([lesson.old.labels, lesson.field.labels])
    model = onnx.load(lesson.path)
    weights, bias = (numpy_helper.to_array(each).astype(np.float64) for each in model.graph.initializer)
    wanted = np.eye(3)[labels]
    for _ in range(1800):
        scores = np.exp(x @ weights + bias)
        gradient = (scores / scores.sum(axis=1, keepdims=True) - wanted) / len(x)
        weights, bias = weights - 0.5 * x.T @ gradient, bias - 0.5 * gradient.sum(axis=0)
    for tensor, values in zip(model.graph.initializer, (weights, bias)):
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    path = lesson.path.with_name("tuned.onnx")
    onnx.save(model, path)
    return path
'''
FORGETFUL = TRAIN.replace('lesson.old.inputs["x"], ', "").replace("lesson.old.labels, ", "")


def draw(count: int, seed: int, *, is_field: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and true classes."""
    weights, bias = (numpy_helper.to_array(each) for each in onnx.load_from_string(linear_model()).graph.initializer)
    x = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    x[:, 3] = 0
    labels = (x @ weights + bias).argmax(axis=1)
    if is_field:
        x[:, 0] += SHIFT
        x[:, 3] = 1
    return x, labels


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(pipeline, "TIMING_SECONDS", {"fast": 0.02, "default": 0.02, "max": 0.02})


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A repository in which release 1.0.0 serves, and everything to make the next one of."""
    folder = tmp_path_factory.mktemp("loop")
    (folder / "net.onnx").write_bytes(linear_model())
    (folder / "train.py").write_text(TRAIN)
    for name, count, seed in (("old", 1200, 1), ("eval", 1500, 2)):
        x, labels = draw(count, seed)
        np.savez(folder / f"{name}.npz", x=x, labels=labels, class_names=CLASSES)
    x, labels = draw(600, 3, is_field=True)
    labels[::4] = -1
    np.savez(folder / "field.npz", x=x, labels=labels)
    lines = (
        "optimize net.onnx -t host -d old.npz --eval eval.npz --effort fast -q -o first --budget top1_drop<=0.5",
        "bundle keygen --out pub",
        "bundle pack first --name net --version 1.0.0 --key pub.pem --data eval.npz",
        "repo init repo --keys keys",
        "repo trust repo pub.pub",
        "repo publish repo net-1.0.0.edgekit",
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        for line in lines:
            assert main(line.split()) == 0, line
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def place(published, tmp_path, monkeypatch):
    """A copy of it."""
    shutil.copytree(published, tmp_path / "loop")
    monkeypatch.chdir(tmp_path / "loop")
    return tmp_path / "loop"


def recalibrate(*more: str, train: str = "train.py:train", samples: str = "field.npz") -> int:
    words = "recalibrate net --model net.onnx --repository repo --data old.npz --eval eval.npz -t host --effort fast -q"
    words += " --key pub.pem --budget top1_drop<=0.5 --margin 0.03"
    words += f" --train {train}" if train else ""
    words += f" --samples {samples}" if samples else ""
    return main([*words.split(), *more])


def releases(capsys) -> dict[str, str]:
    capsys.readouterr()
    main(["repo", "status", "repo", "--json"])
    listed = json.loads(capsys.readouterr().out)["releases"]
    return {each["info"]["channel"]: each["info"]["version"] for each in listed}


def finished(job: Path) -> dict[str, int]:
    return {each["name"]: each["finished_ms"] for each in json.loads((job / "job.json").read_text())["stages"]}


def test_better_model_is_published_with_where_it_comes_from(place, capsys):
    assert recalibrate("-o", "job") == 0
    told = capsys.readouterr()
    assert "better: net@1.0.1 is published on staging" in told.out
    assert 'edgekit fleet rollout start net@1.0.1 --channel staging --waves "canary:1,10%,50%,100%"' in told.out
    assert releases(capsys) == {"production": "1.0.0", "staging": "1.0.1"}

    bundle = read_bundle(place / "job" / "net-1.0.1.edgekit")
    refs = {ref.path: ref.digest for ref in bundle.manifest.blobs}
    said = json.loads(bundle.blob(refs["recalibration.json"]))
    lineage = said["lineage"]
    assert (lineage["parent"], lineage["field_samples"], lineage["labelled"]) == ("net@1.0.0", 600, 450)
    assert {each["name"]: each["verdict"] for each in said["comparison"]} == {
        "old evaluation data": "not worse",
        "field samples": "better",
    }
    baseline = json.loads(bundle.blob(refs["baseline.json"]))
    assert baseline["samples"] == 600
    assert next(each for each in baseline["streams"] if each["name"] == "x[0]")["mean"] == pytest.approx(SHIFT, abs=0.3)
    golden = decode_msgpack(bundle.blob(refs["golden.msgpack"]), GoldenSet)
    with np.load(place / "eval.npz") as data:
        old = {row.tobytes() for row in data["x"]}
    assert {each.inputs["x"].data for each in golden.samples} <= old  # no sample of the field travels to devices


def test_nothing_learns_from_what_the_verdict_rests_on(place):
    (place / "spy.py").write_text(
        TRAIN.replace("    wanted =", '    np.save("seen.npy", lesson.field.inputs["x"])\n    wanted =')
    )
    assert recalibrate("--no-publish", "-o", "job", train="spy.py:train") == 0
    with np.load("field.npz") as data:
        found = load_field(place / "job", CONTRACT)
        assert len(found) == len(data["x"])
    _, held = split_holdout(found)
    kept_back = {row.tobytes() for row in found.data.inputs["x"][held]}
    _, on_field = json.loads((place / "job" / "comparison.json").read_text())
    assert on_field["samples"] == len(kept_back) > 100
    for name in ("job/calibration.npz", "job/development.npz"):
        with np.load(place / name) as data:
            assert not kept_back & {row.tobytes() for row in data["x"]}
    seen = {row.tobytes() for row in np.load("seen.npy")}
    assert len(seen) == 450 - len(kept_back)
    assert not kept_back & seen


def test_field_data_is_for_its_owner_only(place):
    assert recalibrate("--no-publish", "-o", "job") == 0
    assert stat.S_IMODE((place / "job").stat().st_mode) == 0o700
    private = {"field.npz", "calibration.npz", "development.npz", "report.html", "report.md", "comparison.json", "job.json"}
    assert {stat.S_IMODE((place / "job" / name).stat().st_mode) for name in private} == {0o600}


def test_what_is_not_better_is_not_published(place, capsys):
    assert recalibrate("-o", "job", train="") == 1
    assert "Nothing was published: net@1.0.0 goes on serving" in capsys.readouterr().out
    assert releases(capsys) == {"production": "1.0.0"}
    assert "net@1.0.0" in (place / "job" / "report.html").read_text()
    assert not list((place / "job").glob("*.edgekit"))


def test_too_few_samples_are_refused_before_anything_is_made(place, capsys):
    assert recalibrate("-o", "job", "--min-samples", "5000") == 1
    assert "600 distinct field samples, at least 5000 are needed" in capsys.readouterr().out
    assert not (place / "job" / "candidates").exists()


def test_what_was_lost_on_old_data_stops_it(place, capsys):
    (place / "forgetful.py").write_text(FORGETFUL)
    assert recalibrate("-o", "job", train="forgetful.py:train") == 1
    out = capsys.readouterr().out
    assert "worse" in next(line for line in out.splitlines() if line.startswith("old evaluation data"))
    assert "better" in next(line for line in out.splitlines() if line.startswith("field samples"))
    assert releases(capsys) == {"production": "1.0.0"}


def test_interrupted_job_goes_on_where_it_was(place, capsys, monkeypatch):
    def interrupt(_run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recalibrate_stages, "evaluate_rivals", interrupt)
        assert recalibrate("-o", "job") == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    before = finished(place / "job")
    assert set(before) == {"samples", "check", "data", "train", "compile"}
    assert recalibrate("-o", "job") == 0
    after = finished(place / "job")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"evaluate", "pack", "publish"}
    assert recalibrate("-o", "job") == 0  # once more: nothing is made or published twice
    assert finished(place / "job") == after
    assert releases(capsys) == {"production": "1.0.0", "staging": "1.0.1"}


def test_other_settings_do_the_stages_that_they_decide_again(place):
    assert recalibrate("--no-publish", "-o", "job") == 0
    before = finished(place / "job")
    assert recalibrate("--no-publish", "-o", "job", "--share", "0.3") == 0
    after = finished(place / "job")
    assert {name for name in after if after[name] != before[name]} >= {"data", "train", "compile", "evaluate"}
    assert (after["samples"], after["check"]) == (before["samples"], before["check"])


def test_without_labels_both_are_compared_with_the_float_model(place, capsys):
    with np.load("field.npz") as data:
        np.savez("unlabelled.npz", x=data["x"])
    assert recalibrate("-o", "job", "--accept", "not-worse", train="", samples="unlabelled.npz") == 0
    _, on_field = json.loads((place / "job" / "comparison.json").read_text())
    assert (on_field["metric"], on_field["classes"]) == ("agreement", [])
    assert 150 < on_field["samples"] < 330
    assert on_field["current"] > 0.9
    assert releases(capsys)["staging"] == "1.0.1"


def test_gated_repository_gets_it_by_promotion(place, capsys):
    assert main(["repo", "gates", "repo", "latency_ratio<=100, drop<=0.05", "--gated"]) == 0
    assert recalibrate("-o", "job") == 0
    assert releases(capsys) == {"production": "1.0.0", "dev": "1.0.1", "staging": "1.0.1"}


def test_training_that_fails_says_so(place, capsys):
    (place / "wrong.py").write_text("def train(lesson):\n    raise RuntimeError('no memory left')\n")
    assert recalibrate("-o", "job", train="wrong.py:train") == 2
    assert "wrong.py:train: RuntimeError: no memory left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--accept", "fine"], "--accept fine"),
        (["--from", "canary"], "no release of net on canary; there is net (production)"),
        (["--min-labels", "0"], "without labels nobody can tell whether training helped"),
        (["--watch"], "--watch and --order need --fleet"),
        (["-o", "repo"], "repo: holds other files"),
    ],
)
def test_wrong_request_is_refused(place, capsys, words, message):
    assert recalibrate(*words) == 2
    assert message in capsys.readouterr().err


# --- with a fleet server


class Server:
    """The fleet's API over a real store, on a real port."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder / "fleet.db"))
        services = assembly.assemble(FleetConfig(database=str(folder / "fleet.db")), self.store)
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        app = make_app(self.store, None, services=services)
        self.server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)

    def give(self, count: int) -> None:
        """Samples of three devices, as they come over MQTT, with labels for two thirds of them."""
        now_ms = time.time_ns() // 1_000_000
        x, labels = draw(count, 5, is_field=True)
        batch = [(f"cam-{number}", birth()) for number in range(3)]
        for at in range(count):
            name, tensor = f"cam-{at % 3}", SampleTensor(name="x", dtype="float32", shape=(1, 4), data=x[at].tobytes())
            facts = {"boot": 7, "time_ms": now_ms, "model_digest": "ab" * 6, "prediction_id": f"p{at}"}
            batch.append((name, InputSample(seq=10 + at, tensors=(tensor,), **facts)))
            if at % 9 < 6:
                batch.append((name, Label(seq=5000 + at, label=str(CLASSES[labels[at]]), **facts)))
        self.store.apply([Received(site="lab", device=name, message=each, received_ms=now_ms) for name, each in batch])
        serves = {"version": "1.0.0", "counter": 1, "manifest_digest": "sha256:" + "cd" * 32, "status": "active"}
        with self.store.write() as connection:
            connection.execute(insert(tables.device_models).values(device_id=1, model="net", model_digest="ab" * 6, **serves))

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.store.close()


@pytest.fixture
def fleet(tmp_path):
    server = Server(tmp_path)
    yield server
    server.stop()


def test_order_is_taken_carried_out_and_finished(place, fleet, capsys):
    fleet.give(500)
    work = Work(fleet.store)
    order = work.open(kind="retrain", model="net", reason="alert 3: drift", actor="system:alerts", now_ms=1)
    assert recalibrate("--fleet", fleet.url, samples="") == 0
    err = capsys.readouterr().err
    assert "order     1: retrain net, alert 3: drift" in err
    assert "no rollout was begun" in err  # this server knows no repository
    assert "edgekit fleet rollout start net@1.0.1 --channel staging" in err
    done = work.get(order.id)
    assert done.state == "done"
    assert "net@1.0.1 is published on staging" in done.result
    actions = [entry.action for entry in Audit(fleet.store).page().entries]
    assert actions[:4] == ["work.done", "samples.exported", "work.taken", "work.opened"]
    bundle = read_bundle(place / "edgekit-out" / "recalibrate-net-order-1" / "net-1.0.1.edgekit")
    refs = {ref.path: ref.digest for ref in bundle.manifest.blobs}
    lineage = json.loads(bundle.blob(refs["recalibration.json"]))["lineage"]
    assert (lineage["order"], lineage["field_samples"], lineage["labelled"]) == (1, 500, 335)
    assert releases(capsys)["staging"] == "1.0.1"


def test_order_ends_with_why_not(place, fleet, capsys):
    fleet.give(400)
    assert recalibrate("--fleet", fleet.url, samples="", train="") == 1
    (order,) = Work(fleet.store).list()
    assert (order.kind, order.state) == ("recalibrate", "failed")
    assert order.reason == "by hand: edgekit recalibrate"
    assert "Nothing was published" in order.result
    assert "staging" not in releases(capsys)


def test_order_of_another_model_is_not_touched(place, fleet, capsys):
    order = Work(fleet.store).open(kind="recalibrate", model="kws", reason="", actor="operator", now_ms=1)
    assert recalibrate("--fleet", fleet.url, "--order", str(order.id), samples="") == 2
    assert "is for kws, not net" in capsys.readouterr().err
    assert Work(fleet.store).get(order.id).state == "open"


def test_without_samples_the_order_stays_with_its_worker(place, fleet, capsys):
    order = Work(fleet.store).open(kind="recalibrate", model="net", reason="", actor="operator", now_ms=1)
    assert recalibrate("--fleet", fleet.url, samples="") == 2
    assert "no field sample can be used" in capsys.readouterr().err
    assert Work(fleet.store).get(order.id).state == "taken"
    fleet.give(500)
    assert recalibrate("--fleet", fleet.url, samples="") == 0  # the same order, not a new one
    assert [(each.id, each.state) for each in Work(fleet.store).list()] == [(order.id, "done")]
