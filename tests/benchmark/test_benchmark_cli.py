"""``edgekit benchmark`` as it is typed, on real models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgekit.benchmark.pinning import allowed_cpus
from edgekit.benchmark.protocol import name_models, run_benchmark
from edgekit.benchmark.run_file import read_run, write_run
from edgekit.cli import console
from edgekit.cli.main import main
from edgekit.errors import ArtifactError
from edgekit.schema.base import decode_json
from edgekit.schema.benchmark import BenchmarkRequest, RunComparison
from edgekit.schema.digest import digest_file
from edgekit.schema.measurement import LatencyReport
from edgekit.target.probe import probe_target

QUICK = ["--seconds", "0", "--runs", "5"]


@pytest.fixture
def model(sample_dir) -> str:
    return str(sample_dir / "model.onnx")


def write_linear(path, *, width: int, name: str = "x") -> str:
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", [name], ["y"])],
        "relu",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


def test_table_on_stdout_and_host_on_stderr(model, capfd):
    assert main(["benchmark", model, model, *QUICK]) == 0
    captured = capfd.readouterr()
    header, first, second = captured.out.splitlines()
    for column in ("p50 ms", "p90 ms", "p99 ms", "mean ms", "p50 95 %", "ratio", "ratio 95 %", "verdict", "size", "peak RSS"):
        assert column in header
    assert first.startswith("model.onnx ")
    assert first.endswith("baseline")
    assert second.startswith("model.onnx (2)")
    assert second.split()[-1] in {"tie", "faster", "slower"}
    assert "measured on" in captured.err
    assert f"{probe_target().cores} CPUs" in captured.err  # not those that it was pinned to
    assert "onnxruntime" in captured.err
    assert "5 interleaved rounds, 1 thread" in captured.err
    assert "noise" in captured.err


def test_json_is_the_records_and_nothing_else(model, capfd):
    assert main(["benchmark", model, model, *QUICK, "--json"]) == 0
    captured = capfd.readouterr()
    reports = {name: decode_json(json.dumps(value), LatencyReport) for name, value in json.loads(captured.out).items()}
    assert list(reports) == ["model.onnx", "model.onnx (2)"]
    assert reports["model.onnx"].ratio is None
    assert reports["model.onnx (2)"].ratio is not None
    assert all(report.runs == 5 and report.peak_rss_mb > 20 for report in reports.values())
    assert captured.err == ""


@pytest.mark.parametrize("by_path", [True, False])
def test_baseline_by_name_or_path(model, tmp_path, capsys, by_path):
    other = shutil.copy(model, tmp_path / "other.onnx")
    wanted = str(other) if by_path else "other.onnx"
    assert main(["benchmark", model, str(other), *QUICK, "--baseline", wanted, "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [name for name, report in reports.items() if report["ratio"] is None] == ["other.onnx"]


def test_data_of_the_user(model, sample_dir, capsys):
    assert main(["benchmark", model, *QUICK, "--data", str(sample_dir / "calibration.npz"), "--batch", "3"]) == 0
    assert "model.onnx" in capsys.readouterr().out


def test_models_with_other_input_names(tmp_path, capsys):
    models = [write_linear(tmp_path / f"{name}.onnx", width=8, name=name) for name in ("a", "b")]
    assert main(["benchmark", *models, *QUICK]) == 0
    assert "b.onnx" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{model}", "--baseline", "gone.onnx"], "gone.onnx: not among the models."),
        (["{folder}/gone.onnx"], "there is no such file"),
        (["{folder}/model.pb"], "is no model format"),
        (["{model}", "--data", "{folder}/gone.npz"], "gone.npz"),
        (["{model}", "--data", "{folder}/wrong.npz"], "wrong.npz"),
        (["{folder}/narrow.onnx", "{folder}/wide.onnx"], "one request must fit both"),
        (["{model}", "--threads", "1,x"], "--threads 1,x: expected numbers"),
        (["{model}", "--threads", "0"], "--threads 0: expected numbers"),
        (["{model}", "--save", "{folder}"], "is a directory"),
        (["compare", "{folder}/gone.json", "{folder}/gone.json"], "there is no such file"),
    ],
)
def test_bad_input_is_exit_2_and_named(model, tmp_path, capsys, arguments, text):
    np.savez(tmp_path / "wrong.npz", image=np.zeros((4, 3, 3), np.float32))
    write_linear(tmp_path / "narrow.onnx", width=4)
    write_linear(tmp_path / "wide.onnx", width=6)
    filled = [argument.format(model=model, folder=tmp_path) for argument in arguments]
    assert main(["benchmark", *filled, *(QUICK if arguments[0] != "compare" else [])]) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.out == ""


def test_damaged_model_is_exit_3(model, tmp_path, capsys):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    assert main(["benchmark", model, str(broken), *QUICK]) == 3
    assert "broken.onnx" in capsys.readouterr().err


# --- thread lists, kept runs, pinning ---------------------------------------------------------------------------------------


@pytest.fixture
def kept(model, tmp_path, capsys) -> str:
    path = str(tmp_path / "run.json")
    assert main(["benchmark", model, model, *QUICK, "--save", path]) == 0
    capsys.readouterr()
    return path


def test_a_table_for_each_thread_count(model, capsys):
    assert main(["benchmark", model, *QUICK, "--threads", "2,1,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "thread" in line] == ["2 threads", "1 thread"]
    assert sum(line.startswith("model.onnx") for line in lines) == 2


def test_json_of_several_thread_counts_is_by_count(model, capsys):
    assert main(["benchmark", model, *QUICK, "--threads", "1,2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {count: reports["model.onnx"]["threads"] for count, reports in found.items()} == {"1": 1, "2": 2}


def test_kept_run_holds_what_a_comparison_needs(model, kept):
    run = read_run(Path(kept))
    assert [item.name for item in run.models] == ["model.onnx", "model.onnx (2)"]
    assert all(item.size_bytes == Path(model).stat().st_size for item in run.models)
    assert {item.digest for item in run.models} == {digest_file(Path(model))}
    (part,) = run.runs
    assert {len(times) for times in part.times_ms.values()} == {5}
    assert np.median(part.times_ms["model.onnx"]) == pytest.approx(part.reports["model.onnx"].p50_ms, abs=1e-5)
    assert part.conditions.after.monotonic_s > part.conditions.before.monotonic_s


def test_kept_rounds_are_few_paired_and_spread(model):
    request = BenchmarkRequest(models=(model, model), seconds=0.0, min_runs=2500)
    part = run_benchmark(request).runs[0]
    assert {len(times) for times in part.times_ms.values()} == {2000}
    assert part.reports["model.onnx"].runs == 2500


@pytest.mark.parametrize(("wanted", "count"), [(None, 1), (True, 1), (False, 0)])
def test_pinned_while_it_lasts(model, wanted, count):
    before = allowed_cpus()
    if wanted is None and len(before) == 1:
        count = 0  # one thread on one CPU: there is nothing to choose
    run = run_benchmark(BenchmarkRequest(models=(model,), seconds=0.0, min_runs=5, is_pinned=wanted))
    assert len(run.runs[0].cpus) == count
    assert allowed_cpus() == before
    assert run.host.cores == probe_target().cores


def test_more_threads_than_cpus_are_not_pinned(model):
    threads = len(allowed_cpus()) + 1
    request = BenchmarkRequest(models=(model,), threads=(threads,), seconds=0.0, min_runs=2, is_pinned=True)
    part = run_benchmark(request).runs[0]
    assert part.cpus == ()
    assert any("not pinned" in text for text in part.notes)


def test_mask_is_restored_when_a_model_fails(model, tmp_path):
    before = allowed_cpus()
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError):
        run_benchmark(BenchmarkRequest(models=(model, str(tmp_path / "broken.onnx"))))
    assert allowed_cpus() == before


def test_table_reads_well_at_eighty_columns(model, capsys, monkeypatch):
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["benchmark", model, model, *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line] == ["model", "model.onnx", "model.onnx"] * 2
    assert not any(line.startswith(" ") for line in lines)


def test_names_take_folders_only_to_tell_files_apart():
    paths = ["a/fp32.onnx", "b/x/int8.onnx", "c/x/int8.onnx", "a/fp32.onnx"]
    assert name_models(paths) == ["fp32.onnx", "b/x/int8.onnx", "c/x/int8.onnx", "fp32.onnx (2)"]
    assert name_models(["m.onnx", "x/m.onnx"]) == ["m.onnx", "x/m.onnx"]


# --- compare ----------------------------------------------------------------------------------------------------------------


def test_help_shows_the_timing_and_the_comparison(capsys):
    assert main(["benchmark", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--seconds" in text
    assert "compare" in text
    assert main(["benchmark", "compare", "--help"]) == 0
    assert "benchmark compare [OPTIONS]" in capsys.readouterr().out


def test_file_named_compare_is_still_a_model(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(model, "compare.onnx")
    assert main(["benchmark", "compare.onnx", *QUICK]) == 0
    assert main(["benchmark", *QUICK, "./compare"]) == 2  # a model: no such file


def test_run_compared_with_itself(kept, capsys):
    assert main(["benchmark", "compare", kept, kept, "--fail-above", "1.05"]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert "old p50 ms" in header
    assert first.endswith("reference")
    assert second.endswith("tie")


def slow_down(kept: str, path: Path, factor: float) -> str:
    """The second model's times times a factor, and other bytes."""
    run = read_run(Path(kept))
    (part,) = run.runs
    name = run.models[1].name
    report = part.reports[name]
    changed = msgspec.structs.replace(
        part,
        times_ms=part.times_ms | {name: tuple(value * factor for value in part.times_ms[name])},
        reports=part.reports | {name: msgspec.structs.replace(report, p50_ms=report.p50_ms * factor)},
    )
    model = msgspec.structs.replace(run.models[1], digest="sha256:" + "0" * 64)
    write_run(path, msgspec.structs.replace(run, runs=(changed,), models=(run.models[0], model)))
    return str(path)


def test_slower_model_fails_in_ci(kept, tmp_path, capsys):
    slow = slow_down(kept, tmp_path / "slow.json", 50.0)
    assert main(["benchmark", "compare", kept, slow, "--fail-above", "1.05"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[2].endswith("slower")
    assert "--fail-above 1.05: model.onnx (2) with 1 thread takes 50.000 times as long" in captured.err
    assert main(["benchmark", "compare", kept, slow]) == 0
    assert main(["benchmark", "compare", slow, kept, "--fail-above", "1.05"]) == 0  # faster


def test_comparison_as_json(kept, capsys):
    assert main(["benchmark", "compare", kept, kept, "--json"]) == 0
    captured = capsys.readouterr()
    comparison = decode_json(captured.out, RunComparison)
    assert [change.change for change in comparison.changes] == ["reference", "tie"]
    assert captured.err == ""


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\xff"])
def test_damaged_run_is_exit_3(tmp_path, kept, capsys, text):
    broken = tmp_path / "broken.json"
    broken.write_text(text)
    assert main(["benchmark", "compare", kept, str(broken)]) == 3
    assert "broken.json: not a valid BenchmarkRun" in capsys.readouterr().err


def test_run_of_a_newer_edgekit_and_run_without_times(tmp_path, kept, capsys):
    run = read_run(Path(kept))
    write_run(tmp_path / "newer.json", msgspec.structs.replace(run, schema_version=99))
    lacking = msgspec.structs.replace(run.runs[0], times_ms={"model.onnx": (1.0,)})
    write_run(tmp_path / "lacking.json", msgspec.structs.replace(run, runs=(lacking,)))
    assert main(["benchmark", "compare", kept, str(tmp_path / "newer.json")]) == 3
    assert "in a newer form" in capsys.readouterr().err
    assert main(["benchmark", "compare", kept, str(tmp_path / "lacking.json")]) == 3
    assert "it lacks the times" in capsys.readouterr().err


def test_matched_models_go_by_their_new_names(kept, capsys):
    assert main(["benchmark", "compare", kept, kept, "--match", "model.onnx=model.onnx (2)"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].startswith("model.onnx (2)")
    assert "model.onnx (2) was model.onnx in the old run" in captured.err


def test_match_without_an_equals_sign(kept, capsys):
    assert main(["benchmark", "compare", kept, kept, "--match", "model.onnx"]) == 2
    assert "expected OLD=NEW" in capsys.readouterr().err
