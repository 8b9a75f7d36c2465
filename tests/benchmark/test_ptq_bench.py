"""The benchmark of quantizers: runs of tools that are small scripts, and what is measured of their models."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.runtime.registry import open_session

PTQ = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "ptq"
MODULES = ("peers", "runs", "measure", "summary")
FEATURES, CLASSES = 8, 4


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(PTQ))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


def save_linear(path: Path, weights: np.ndarray, output: str = "logits") -> None:
    """One matrix product: float32 [batch, 8] to [batch, classes]."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], [output])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", weights.shape[1]])],
        [numpy_helper.from_array(weights.astype(np.float32), "w")],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(FEATURES, CLASSES))


@pytest.fixture
def cache(tmp_path, weights) -> Path:
    """A cache with one model; its labels are its own answers, so that its accuracy is 1."""
    folder = tmp_path / "models" / "linear"
    save_linear(folder / "model.onnx", weights)
    x = np.random.default_rng(1).normal(size=(400, FEATURES)).astype(np.float32)
    labels = (x @ weights.astype(np.float32)).argmax(axis=1)
    np.savez(folder / "calibration.npz", x=x, labels=labels)
    np.savez(folder / "evaluation.npz", x=x[:100], labels=labels[:100])
    (folder / "about.json").write_text(json.dumps({"name": "linear", "metric": "top1"}))
    return tmp_path


def add_result(bench, cache: Path, tool: str, weights: np.ndarray | None, **changes) -> None:
    """A result as run_tool keeps it; without weights a failed one."""
    folder = cache / "results" / "linear" / tool
    folder.mkdir(parents=True)
    if weights is not None:
        save_linear(folder / "model.onnx", weights)
    cost = bench.runs.Cost(seconds=2.0, cpu_seconds=1.5, peak_rss_mb=50.0)
    given = bench.runs.given_to(cache / "models" / "linear")
    run = bench.runs.Run(tool=tool, version="1.0", given=given, cost=cost)
    (folder / "run.json").write_text(json.dumps(asdict(replace(run, **changes))))


# --- measure ----------------------------------------------------------------------------------------------------------------


def measured(bench, cache: Path):
    return bench.measure.measure_model(cache, "linear", list(bench.peers.TOOLS), seconds=0.01)


def test_two_models_measured(bench, cache, weights):
    add_result(bench, cache, "ort-good", weights + 1e-3)
    add_result(bench, cache, "nncf", -weights)
    report = measured(bench, cache)
    assert [row.tool for row in report.rows] == ["fp32", "ort-good", "nncf"]
    fp32, good, bad = report.rows
    assert (fp32.quality.value, fp32.quality.drop, fp32.quality.is_in_budget) == (1.0, 0.0, True)
    assert good.is_usable
    assert good.quality.agreement == pytest.approx(good.quality.value)
    assert 40 < good.quality.sqnr_db < 120
    assert not bad.is_usable
    assert bad.quality.drop > 0.5
    assert good.size_bytes == (cache / "results/linear/ort-good/model.onnx").stat().st_size
    assert (good.seconds, good.cpu_seconds, good.peak_rss_mb) == (2.0, 1.5, 50.0)
    for row in report.rows:
        assert [item.threads for item in row.timings] == [1, 2]
        assert all(item.ratio_low <= item.ratio <= item.ratio_high for item in row.timings)


def test_failed_tool_is_a_row_with_its_reason(bench, cache, weights):
    add_result(bench, cache, "nncf", None, failure="ValueError: no such operator")
    add_result(bench, cache, "olive", weights[:, :2])
    (cache / "results/linear/inc").mkdir(parents=True)
    report = measured(bench, cache)
    assert report.row("nncf").failure == "ValueError: no such operator"
    assert report.row("olive").failure.startswith("made, but does not run: ")
    assert report.row("olive").timings == ()
    assert report.row("inc") is None
    text = bench.summary.plain(bench.summary.summarize([report]))
    assert "nncf: ValueError: no such operator" in text


def test_result_of_another_model_is_left_out(bench, cache, weights):
    add_result(bench, cache, "nncf", weights)
    save_linear(cache / "models/linear/model.onnx", weights, output="scores")
    assert [row.tool for row in measured(bench, cache).rows] == ["fp32"]


@pytest.mark.parametrize(
    ("metric", "value", "baseline", "is_kept"),
    [
        ("top1", 0.900, 0.909, True),
        ("top1", 0.900, 0.910, False),
        ("mae", 2.02, 2.0, True),
        ("mae", 2.03, 2.0, False),
        ("agreement", 0.99, 1.0, True),
        ("agreement", 0.98, 1.0, False),
        ("sqnr_db", 20.0, 200.0, True),
        ("sqnr_db", 19.9, 200.0, False),
    ],
)
def test_budget_by_metric(bench, metric, value, baseline, is_kept):
    report = SimpleNamespace(metric=metric, value=value, drop=abs(baseline - value), baseline=baseline)
    assert bench.measure.is_in_budget(report) is is_kept


# --- summary ----------------------------------------------------------------------------------------------------------------


def make_row(bench, tool: str, ratio: float, *, is_kept: bool = True, verdict: str = "faster", seconds: float = 1.0):
    timing = bench.measure.Timing(
        threads=1, p50_ms=ratio, ratio=ratio, ratio_low=ratio, ratio_high=ratio, noise=0.01, verdict=verdict
    )
    quality = bench.measure.Quality(value=0.9, drop=0.0, sqnr_db=30.0, agreement=None, is_in_budget=is_kept)
    return bench.measure.Row(tool=tool, version="1", seconds=seconds, quality=quality, timings=(timing,))


def make_report(bench, name: str, *rows):
    return bench.measure.ModelReport(model=name, metric="top1", samples=9, rows=(make_row(bench, "fp32", 1.0), *rows))


def test_best_alternative_is_in_budget_and_never_slower_than_fp32(bench):
    quick = make_report(
        bench,
        "a",
        make_row(bench, "nncf", 0.3, is_kept=False, seconds=4.0),
        make_row(bench, "ort-good", 0.8),
        make_row(bench, "edgekit-fast", 0.1, is_kept=False, verdict="slower", seconds=2.0),
        make_row(bench, "edgekit", 0.4),
    )
    slow = make_report(bench, "b", make_row(bench, "nncf", 1.5, seconds=1.0), make_row(bench, "edgekit", 0.5))
    summary = bench.summary.summarize([quick, slow])
    found = {(item.model, item.tool): (item.best, item.ratio) for item in summary.comparisons}
    assert found == {
        ("a", "edgekit"): ("ort-good", pytest.approx(0.5)),
        ("a", "edgekit-fast"): ("ort-good", pytest.approx(1.25)),
        ("b", "edgekit"): ("fp32", pytest.approx(0.5)),
    }
    assert summary.geometric_means == {"edgekit": pytest.approx(0.5), "edgekit-fast": pytest.approx(1.25)}
    assert summary.seconds_over_nncf == {"a": pytest.approx(0.5)}
    lines = bench.summary.figures(summary)
    assert "models where edgekit-fast is slower than fp32 beyond noise: a" in lines
    assert "models where edgekit is slower than fp32 beyond noise: none" in lines
    assert "| nncf | 0.9000 |" in bench.summary.markdown(summary)


# --- runs -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(bench, cache, monkeypatch):
    """A tool of one script; returns a function that runs it."""
    tool = bench.peers.Tool(name="scripted", family="ort", variant="v")
    monkeypatch.setattr(bench.runs, "HERE", cache)
    monkeypatch.setattr(bench.runs, "environment_python", lambda _cache, _family: Path(sys.executable))

    def run(script: str, **settings):
        (cache / "peer_ort.py").write_text(script)
        return bench.runs.run_tool(cache, "linear", tool, **settings)

    return run


COPY = """
import shutil, sys, os
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert os.environ["OMP_NUM_THREADS"] == "1"
shutil.copy(arguments["--model"], arguments["--out"])
print(arguments["--variant"])
"""


def test_tool_runs_once_until_its_model_changes(bench, cache, scripted, weights):
    assert scripted(COPY).failure is None
    assert (cache / "results/linear/scripted/log.txt").read_text() == "v\n"
    with np.load(cache / "results/linear/calibration.npz") as file:
        assert len(file["x"]) == len(file["labels"]) == bench.peers.LIMIT
    assert scripted("raise SystemExit('never')").failure is None
    save_linear(cache / "models/linear/model.onnx", weights, output="scores")
    assert scripted(COPY).failure is None
    made = open_session(cache / "results/linear/scripted/model.onnx")
    assert [spec.name for spec in made.outputs] == ["scores"]
    made.close()
    assert scripted("raise SystemExit('again')", is_fresh=True).failure == "again"


def test_tool_failure_is_its_last_line_of_error(scripted, cache):
    run = scripted("import sys; print('starting'); print('ValueError: bad axis'); print('bye'); sys.exit(3)")
    assert run.failure == "ValueError: bad axis"
    assert run.cost.peak_rss_mb > 1
    kept = json.loads((cache / "results/linear/scripted/run.json").read_text())
    assert kept["failure"] == "ValueError: bad axis"


def test_tool_without_a_model_has_failed(scripted):
    assert scripted("print('all is well')").failure == "all is well"
    assert scripted("pass", is_fresh=True).failure == "exit status 0"


def test_tool_killed_at_its_time_limit(bench, scripted, tmp_path):
    assert scripted("import time; time.sleep(60)", time_limit_s=0.3).failure == "took longer than 0.3 s"
    code, _cost = bench.runs.spend(["sleep", "60"], tmp_path / "log.txt", 0.2)
    assert code == -signal.SIGKILL


def test_tool_without_an_environment_is_tried_again(bench, cache, monkeypatch, scripted):
    with monkeypatch.context() as patch:
        patch.setattr(bench.runs, "environment_python", lambda _cache, _family: cache / "nowhere")
        assert scripted(COPY).failure == "its environment could not be made"
    assert scripted(COPY).failure is None


def test_samples_are_batches_of_one(bench, cache):
    rows = bench.peers.samples(cache / "models/linear/calibration.npz", ["x"], with_labels=True)
    assert len(rows) == bench.peers.LIMIT
    assert rows[7]["x"].shape == (1, FEATURES)
    with np.load(cache / "models/linear/calibration.npz") as file:
        assert rows[7]["labels"] == file["labels"][7]
        assert np.array_equal(rows[7]["x"][0], file["x"][7])
