"""The benchmark of quantizers: runs of tools that are small scripts, and what is measured of their models."""

from __future__ import annotations

import bz2
import importlib
import json
import signal
import sys
import wave
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import DataError, EnvironmentFault
from edgekit.runtime.registry import open_session

PTQ = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "ptq"
MODULES = ("peers", "runs", "measure", "summary", "checks", "photos", "sources", "networks", "zoo")
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


# --- zoo --------------------------------------------------------------------------------------------------------------------


def linear_zoo(folder: Path, _cache: Path | None = None, seed: int = 3) -> dict[str, str]:
    """A builder of a model with 300 and 200 samples."""
    generator = np.random.default_rng(seed)
    save_linear(folder / "model.onnx", generator.normal(size=(FEATURES, CLASSES)))
    for part, count in (("calibration", 300), ("evaluation", 200)):
        np.savez(folder / f"{part}.npz", x=generator.normal(size=(count, FEATURES)).astype(np.float32))
    return {"kind": "linear", "metric": "agreement", "license": "MIT", "source": "here", "data": "noise"}


def edit_model(folder: Path, change) -> None:
    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")


def edit_rows(folder: Path, part: str, change) -> None:
    x = np.load(folder / f"{part}.npz")["x"]
    np.savez(folder / f"{part}.npz", x=change(x))


def fixed_batch(model) -> None:
    """Sums over the batch: four samples together give other outputs than each alone."""
    model.graph.node[0].output[0] = "product"
    model.graph.node.append(helper.make_node("CumSum", ["product", "axis"], ["logits"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "axis"))


def put_nan(rows: np.ndarray) -> np.ndarray:
    rows[7, 2] = np.nan
    return rows


FAULTS = {
    "opset 16": lambda folder: edit_model(folder, lambda model: setattr(model.opset_import[0], "version", 16)),
    "notes of the exporter": lambda folder: edit_model(folder, lambda model: model.graph.node[0].metadata_props.add(key="at")),
    "299 calibration samples, not 300": lambda folder: edit_rows(folder, "calibration", lambda x: x[:299]),
    "199 evaluation samples, fewer than 200": lambda folder: edit_rows(folder, "evaluation", lambda x: x[:199]),
    "calibration.npz: values that are not finite": lambda folder: edit_rows(folder, "calibration", put_nan),
    "evaluation.npz: samples twice": lambda folder: edit_rows(folder, "evaluation", lambda x: x[[*range(199), 0]]),
    "1 samples in both parts": lambda folder: edit_rows(
        folder, "evaluation", lambda x: np.concatenate([x, np.load(folder / "calibration.npz")["x"][9:10]])
    ),
    "calibration.npz has y, the model takes x": lambda folder: np.savez(folder / "calibration.npz", y=np.zeros((300, 8))),
    "a batch of four gives other outputs than four single samples": lambda folder: edit_model(folder, fixed_batch),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_zoo_fault_of_model_or_data(bench, tmp_path, fault):
    linear_zoo(tmp_path)
    if fault:
        FAULTS[fault](tmp_path)
    assert bench.checks.faults(tmp_path) == ([fault] if fault else [])


def test_zoo_notes_of_the_exporter_are_stripped(bench, tmp_path):
    linear_zoo(tmp_path)
    FAULTS["notes of the exporter"](tmp_path)
    edit_model(tmp_path, lambda model: setattr(model.graph.node[0], "doc_string", "File main.py, line 3"))
    bench.checks.strip(tmp_path / "model.onnx")
    assert bench.checks.faults(tmp_path) == []


@pytest.fixture
def linear_models(bench, tmp_path, monkeypatch):
    """A zoo of two models that counts what it makes; returns the count and a function that runs the program."""
    made: list[str] = []

    def builder(name: str, seed: int):
        def build(folder, _cache):
            made.append(name)
            return linear_zoo(folder, seed=seed)

        return build

    monkeypatch.setattr(bench.zoo, "MODELS", {"first": builder("first", 1), "second": builder("second", 2)})
    return made, lambda *arguments: bench.zoo.main(["--cache", str(tmp_path), *arguments])


def test_zoo_makes_what_is_missing_or_damaged(bench, tmp_path, linear_models, capsys):
    made, run = linear_models
    assert run("--models", "second") == 0
    assert run() == 0
    assert made == ["second", "first"]
    assert "[2/2] second: is there, whole" in capsys.readouterr().err
    assert bench.checks.names(tmp_path) == ["first", "second"]
    about = bench.checks.load_about(tmp_path / "models" / "first")
    assert about["samples"] == {"calibration": 300, "evaluation": 200}
    whole = (tmp_path / "models/first/evaluation.npz").read_bytes()
    (tmp_path / "models/first/evaluation.npz").write_bytes(whole[:-1])
    (tmp_path / "models/second/calibration.npz").unlink()
    assert run() == 0
    assert made == ["second", "first", "first", "second"]
    assert (tmp_path / "models/first/evaluation.npz").read_bytes() == whole


def test_zoo_model_with_a_fault_does_not_appear(bench, tmp_path, linear_models, monkeypatch, capsys):
    made, run = linear_models

    def flawed(folder, _cache):
        about = linear_zoo(folder)
        FAULTS["evaluation.npz: samples twice"](folder)
        return about

    monkeypatch.setitem(bench.zoo.MODELS, "first", flawed)
    assert run() == 1
    assert made == ["second"]
    assert bench.checks.names(tmp_path) == ["second"]
    printed = capsys.readouterr().err
    assert "first: evaluation.npz: samples twice." in printed
    assert "not made: first" in printed


def test_zoo_model_unknown(linear_models, capsys):
    _made, run = linear_models
    with pytest.raises(SystemExit):
        run("--models", "first,third")
    assert "third: no such model; choose from first, second" in capsys.readouterr().err


def test_zoo_about_without_a_key(bench, tmp_path):
    (tmp_path / "about.json").write_text(json.dumps({"kind": "linear", "metric": "top1", "license": "MIT"}))
    with pytest.raises(DataError, match="lacks data, samples, sha256, source"):
        bench.checks.load_about(tmp_path)
    assert not bench.checks.is_whole(tmp_path)


def test_zoo_download_interrupted_leaves_no_package(bench, tmp_path):
    def fill(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    folder = tmp_path / "packages" / "some-1.0"
    with pytest.raises(KeyboardInterrupt):
        bench.sources._unpacked(folder, fill)
    assert not folder.exists()
    bench.sources._unpacked(folder, lambda partial: (partial / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


# --- data of the zoo --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(bench, tmp_path, monkeypatch):
    """Packages whose pictures have one colour each, their number in red, and no apt-get; returns where Debian's belongs."""
    Image = pytest.importorskip("PIL.Image")  # noqa: N806
    pytest.importorskip("sklearn")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    photos, packages = bench.photos, tmp_path / "packages"
    files = [packages / f"scikit-image-{photos.PINS['scikit-image']}" / name for name in photos.SCIKIT_IMAGE]
    for package, names in photos.INSTEAD.items():
        files += [packages / f"{package}-{photos.PINS[package]}" / name for name in names]
    files += [tmp_path / "debian" / name for name in photos.OPENCV_DOC]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".dat":
            file.write_bytes(bz2.compress(np.full(photos.RACCOON_SHAPE, (number, 0, 255), np.uint8).tobytes()))
        else:
            Image.new("RGB", (40, 30), (number, 0, 255)).save(file.with_suffix(".bmp"))
            file.with_suffix(".bmp").rename(file)
    (tmp_path / "debian" / "version").write_text("4.6")
    return tmp_path / "debian"


def colours(part: list[np.ndarray]) -> set[int]:
    """The numbers of a part's pictures, which scikit-learn's two do not have."""
    return {int(picture[0, 0, 0]) for picture in part if (picture[..., 2] == 255).all()}


def test_zoo_photographs_of_debian_split_by_scene(bench, tmp_path, pictures):
    pictures.rename(tmp_path / "packages" / "opencv-doc")
    (calibration, evaluation), origin = bench.sources.photographs(tmp_path)
    assert len(calibration) + len(evaluation) == 2 + len(bench.photos.SCIKIT_IMAGE) + len(bench.photos.OPENCV_DOC)
    assert not colours(calibration) & colours(evaluation)
    assert len(colours(calibration) | colours(evaluation)) == len(calibration) + len(evaluation) - 2
    assert origin.endswith("and Debian's opencv-doc=4.6")


@pytest.mark.parametrize("is_other_release", [False, True])
def test_zoo_photographs_of_wheels_where_debian_has_none(bench, tmp_path, pictures, is_other_release):
    if is_other_release:
        (pictures / bench.photos.OPENCV_DOC[3]).unlink()
        pictures.rename(tmp_path / "packages" / "opencv-doc")
    (calibration, evaluation), origin = bench.sources.photographs(tmp_path)
    count = 2 + len(bench.photos.SCIKIT_IMAGE) + sum(map(len, bench.photos.INSTEAD.values()))
    assert len(calibration) + len(evaluation) == count
    assert not colours(calibration) & colours(evaluation)
    assert len(colours(calibration) | colours(evaluation)) == count - 2
    assert origin.endswith("gradio==6.31.0 matplotlib==3.11.2 scipy==1.9.3 ultralytics==8.4.190 (no Debian package to be had)")


def test_zoo_package_of_debian_without_apt(bench, tmp_path, pictures):
    with pytest.raises(EnvironmentFault, match="asterisk: apt-get cannot download it: there is no apt-get"):
        bench.sources.debian(tmp_path, "asterisk")
    assert not (tmp_path / "packages" / "asterisk").exists()


def test_zoo_crops_keep_the_sides_ratio(bench):
    pytest.importorskip("PIL")
    rows, columns = np.mgrid[0:200, 0:300]
    picture = np.stack([rows, columns // 2, np.zeros_like(rows)], axis=2).astype(np.uint8)
    made = bench.photos.crops([picture, picture[:, :100]], 6, (30, 60), seed=1)
    assert made.shape == (6, 30, 60, 3)
    for crop in made.astype(float):
        height, width = np.ptp(crop[:, 30, 0]), 2 * np.ptp(crop[15, :, 1])
        assert width == pytest.approx(2 * height, rel=0.1)
    assert np.array_equal(made, bench.photos.crops([picture, picture[:, :100]], 6, (30, 60), seed=1))


def test_zoo_sentences_are_prose_and_in_one_part(bench):
    calibration, evaluation = bench.sources.sentences()
    assert len(calibration) == len(evaluation) == bench.sources.SENTENCES
    seen = [frozenset(text.lower().split()) for text in calibration + evaluation]
    assert len(set(seen)) == len(seen)
    first = set(seen[: len(calibration)])
    assert all(len(words & other) <= 0.5 * len(words | other) for words in first for other in seen if other is not words)
    assert not any("__" in text or "(" in text for text in calibration + evaluation)


def test_zoo_recordings_are_in_one_part(bench, tmp_path):
    for number in range(244):
        path = tmp_path / ("silence" if number % 10 == 0 else "digits") / f"{number:03}.wav"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    calibration, evaluation = bench.sources.recordings(tmp_path)
    assert len(calibration) + len(evaluation) == 219
    assert not set(calibration) & set(evaluation)
    assert {path.parent.name for path in calibration + evaluation} == {"digits"}


def test_zoo_frames_follow_each_other_with_their_states(bench, tmp_path):
    sound = np.random.default_rng(0).integers(-9000, 9000, 512 * 3 + 100).astype(np.int16)
    with wave.open(str(tmp_path / "clip.wav"), "wb") as file:
        file.setparams((1, 2, 16000, len(sound), "NONE", ""))
        file.writeframes(sound.tobytes())
    inputs = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 576]),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, ["batch", 2, 128]),
    ]
    nodes = [
        helper.make_node("ReduceMax", ["input"], ["loudest"], axes=[0, 1]),
        helper.make_node("Add", ["state", "loudest"], ["stateN"]),
    ]
    outputs = [helper.make_tensor_value_info("stateN", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "state", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "model.onnx")
    frames, states = bench.zoo.spoken(tmp_path / "model.onnx", [tmp_path / "clip.wav"] * 2)
    assert (frames.shape, states.shape) == ((6, 576), (6, 2, 128))
    assert np.array_equal(frames[:3], frames[3:])
    assert not frames[0, :64].any()
    assert np.array_equal(frames[1, :64], frames[0, 512:])
    assert frames[:3, 64:].ravel() == pytest.approx(sound[: 512 * 3] / 32768, abs=1e-6)
    assert states[:3, 0, 0] == pytest.approx([0, frames[0].max(), frames[:2].max(axis=1).sum()], rel=1e-6)
    assert not states[3].any()
