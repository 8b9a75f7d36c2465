"""The whole optimization on small real models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from small_graphs import branching, constant_weights, convolutional, images, matrix, save, weightless

from edgekit.compiler import pipeline
from edgekit.compiler.graph import facts_of, read_onnx
from edgekit.compiler.output import WORK
from edgekit.compiler.pipeline import optimize
from edgekit.compiler.preparation import Event, OptimizeRequest, Reporter, plan_candidates, prepare
from edgekit.errors import ArtifactError, DataError, EdgekitError, TargetError, UsageError
from edgekit.schema.base import decode_json
from edgekit.schema.candidate import Candidate
from edgekit.schema.digest import digest_file


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(pipeline, "TIMING_SECONDS", {"fast": 0.02, "default": 0.02, "max": 0.02})


@pytest.fixture
def place(tmp_path) -> Path:
    arrays = images(64)
    labels = np.random.default_rng(0).integers(0, 4, 64)
    np.savez(tmp_path / "data.npz", **arrays, labels=labels)
    np.savez(tmp_path / "bare.npz", **images(64, seed=3))
    save(convolutional(channels=16), tmp_path / "net.onnx")
    return tmp_path


def request(place: Path, **changes) -> OptimizeRequest:
    settings = {
        "model": str(place / "net.onnx"),
        "target": "x86-64-avx512-vnni",
        "data": str(place / "bare.npz"),
        "effort": "fast",
        "out": place / "out",
        **changes,
    }
    return OptimizeRequest(**settings)


def by_name(result) -> dict[str, Candidate]:
    return {candidate.name: candidate for candidate in result.candidates}


def test_whole_run_writes_what_it_says(place):
    events: list[Event] = []
    result = optimize(
        request(place, effort="default", evaluation=str(place / "data.npz"), budget="top1_drop<=0.9"), events.append
    )
    out = place / "out"
    assert result.is_budget_met
    assert result.chosen.verdict.status == "chosen"
    written = decode_json((out / "candidate.json").read_bytes(), Candidate)
    assert written == result.chosen
    assert digest_file(out / written.artifact.path) == written.artifact.digest
    for candidate in result.candidates:
        if candidate.name != result.chosen.name:
            folder = out / "candidates" / candidate.name
            assert decode_json((folder / "candidate.json").read_bytes(), Candidate) == candidate
            assert candidate.artifact is None or digest_file(folder / candidate.artifact.path) == candidate.artifact.digest
    assert (out / "report.html").stat().st_size > 1000
    assert (out / "report.json").is_file()
    done = [event.done for event in events]
    assert done == sorted(done)
    assert done[-1] == 1.0


def test_lineage_leads_from_the_source_to_the_file(place):
    result = optimize(request(place))
    for candidate in result.candidates:
        outputs = [step.output for step in candidate.lineage]
        assert candidate.lineage[0].parent == result.chosen.source.digest
        assert [step.parent for step in candidate.lineage[1:]] == outputs[:-1]
        assert outputs[-1] == candidate.artifact.digest
        assert all(step.versions for step in candidate.lineage)


def test_every_candidate_is_timed_against_the_baseline(place):
    result = optimize(request(place))
    names = by_name(result)
    assert result.baseline.name == "fp32"
    assert names["int8-per-channel"].latency.ratio > 0
    assert names["int8-per-channel"].evaluation.isa
    assert len({candidate.latency.runs for candidate in result.candidates}) == 1
    assert result.op_latency["fp32"][0].ms > 0
    assert any(candidate.is_on_pareto_front for candidate in result.candidates)


def test_no_labels_and_no_evaluation_data(place):
    result = optimize(request(place))
    assert result.request.metric == "agreement"
    assert result.request.budget == "agreement>=0.99"
    assert result.request.is_default_budget
    assert any("no --eval data" in text for text in result.warnings)


def test_budget_that_cannot_be_met_still_writes_the_best(place):
    result = optimize(request(place, budget="latency_ms<=0.0000001"))
    assert not result.is_budget_met
    assert result.verdict.startswith("Budget not met")
    assert (place / "out" / "model.onnx").is_file()


def test_memory_is_measured_where_the_budget_asks(place):
    result = optimize(request(place, budget="ram_mb<=5"))
    check = result.chosen.verdict.checks[0]
    assert not result.is_budget_met
    assert 20 < check.value < 1000
    assert check.value == result.chosen.latency.peak_rss_mb
    assert optimize(request(place)).chosen.latency.peak_rss_mb is None


def test_same_request_gives_the_same_bytes(place):
    first = optimize(request(place, out=place / "a", effort="default"))
    second = optimize(request(place, out=place / "b", effort="default"))
    digests = [{c.name: c.artifact and c.artifact.digest for c in result.candidates} for result in (first, second)]
    assert digests[0] == digests[1]
    assert any(digests[0].values())


def test_earlier_result_is_replaced_and_its_steps_are_reused(place, monkeypatch):
    first = optimize(request(place))
    ran = []
    monkeypatch.setattr("edgekit.compiler.passes.on_onnx.quantize_static.collect_ranges", lambda *a, **k: ran.append(a))
    second = optimize(request(place, budget="size_mb<=100"))
    assert ran == []
    assert by_name(second)["int8-per-channel"].artifact == by_name(first)["int8-per-channel"].artifact
    assert not list(place.glob(".out*"))


def test_other_data_is_not_answered_from_the_cache(place):
    first = by_name(optimize(request(place)))["int8-per-channel"]
    np.savez(place / "bare.npz", x=images(64)["x"] * 3)
    second = by_name(optimize(request(place)))["int8-per-channel"]
    assert first.artifact.digest != second.artifact.digest


def test_interrupted_run_goes_on(place, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "evaluate_candidates", interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimize(request(place))
    assert len(list((place / "out" / WORK / "steps").glob("*/step.json"))) == 3
    assert not (place / "out" / "candidate.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "TIMING_SECONDS", {"fast": 0.02})
    monkeypatch.setattr("edgekit.compiler.passes.on_onnx.quantize_static.collect_ranges", interrupt)
    assert optimize(request(place)).chosen.artifact is not None


def test_damaged_step_is_made_again(place):
    optimize(request(place))
    for path in (place / "out" / WORK / "steps").glob("*/*.onnx"):
        path.write_bytes(b"damaged")
    assert {c.verdict.status for c in optimize(request(place)).candidates} <= {"chosen", "passed", "missed"}


def test_foreign_folder_is_refused(place):
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.txt") as caught:
        optimize(request(place))
    assert caught.value.code == "output.foreign"
    assert (place / "out" / "thesis.txt").read_text() == "mine"


def test_failed_candidate_does_not_stop_the_others(place, monkeypatch):
    def fail(*_args, **_kwargs):
        raise ZeroDivisionError("inside a foreign tool")

    monkeypatch.setattr("edgekit.compiler.passes.on_onnx.quantize_static.collect_ranges", fail)
    result = optimize(request(place, effort="default"))
    failed = by_name(result)["int8-per-channel"]
    assert failed.verdict.status == "failed"
    assert failed.artifact is None
    assert "inside a foreign tool" in failed.verdict.reason
    assert result.is_budget_met
    record = decode_json((place / "out" / "candidates" / "int8-per-channel" / "candidate.json").read_bytes(), Candidate)
    assert record.verdict.status == "failed"


def test_candidate_that_answers_nan_fails(place, monkeypatch):
    real = pipeline.predict

    def spoil(session, data, **kwargs):
        outputs = real(session, data, **kwargs)
        is_dynamic = kwargs.get("batch_size") == 1
        return {name: np.full_like(array, np.nan) for name, array in outputs.items()} if is_dynamic else outputs

    monkeypatch.setattr(pipeline, "predict", spoil)
    result = optimize(request(place, effort="default"))
    assert "NaN" in by_name(result)["int8-dynamic"].verdict.reason


# --- models with traits -----------------------------------------------------------------------------------------------------


def run_model(place: Path, proto: onnx.ModelProto, arrays=None, **changes):
    save(proto, place / "trait.onnx")
    if arrays is not None:
        np.savez(place / "trait.npz", **arrays)
        changes["data"] = str(place / "trait.npz")
    return optimize(request(place, model=str(place / "trait.onnx"), **changes))


@pytest.mark.parametrize(
    "proto",
    [convolutional(opset=11), constant_weights(), convolutional(batch=1), convolutional(batch=4)],
    ids=["opset-11", "constants", "batch-1", "batch-4"],
)
def test_model_is_quantized_whatever_its_form(place, proto):
    result = run_model(place, proto)
    assert by_name(result)["int8-per-channel"].verdict.status != "failed"


def test_several_inputs_and_outputs(place):
    random = np.random.default_rng(0)
    arrays = {"left": random.normal(size=(40, 6)).astype(np.float32), "right": random.normal(size=(40, 10)).astype(np.float32)}
    result = run_model(place, matrix(), arrays, effort="default", metric="sqnr_db")
    assert {spec.name for spec in result.chosen.contract.inputs} == {"left", "right"}
    assert len(result.chosen.artifact.outputs) == 2
    assert by_name(result)["int8-dynamic"].evaluation.value > 20


def test_network_inside_a_branch(place):
    arrays = {"x": np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)}
    result = run_model(place, branching(), arrays)
    assert "subgraphs" in by_name(result)["int8-per-channel"].verdict.reason
    assert result.chosen.artifact.parameters == 2 * 16 * 16 + 1
    assert result.is_budget_met


def test_nothing_to_quantize(place):
    result = run_model(place, weightless(), {"x": np.random.default_rng(0).random((40, 5), dtype=np.float32)}, effort="default")
    assert result.chosen.name in ("fp32", "fp32-optimized")
    assert "nothing to quantize" in result.verdict


def test_half_precision_model(place):
    result = run_model(place, convolutional(dtype=np.float16), {"x": images(40)["x"].astype(np.float16)})
    assert "float16" in by_name(result)["int8-per-channel"].verdict.reason
    assert result.chosen.contract.inputs[0].dtype == "float16"


def test_quantized_model_is_cleaned_only(place):
    optimize(request(place))
    name = "out/candidates/int8-per-channel/model.onnx"
    path = place / name if (place / name).exists() else place / "out" / "model.onnx"
    assert facts_of(read_onnx(path)).is_quantized
    result = optimize(request(place, model=str(path), out=place / "again"))
    assert "already quantized" in by_name(result)["int8-per-channel"].verdict.reason
    assert result.chosen.artifact.precision == "int8"


def test_custom_operator_is_refused_clearly(place):
    model = convolutional()
    model.graph.node[2].domain = "com.example"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    (place / "custom.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError) as caught:
        optimize(request(place, model=str(place / "custom.onnx")))
    assert caught.value.code == "model.unloadable"


# --- bad input --------------------------------------------------------------------------------------------------------------


def code_of(call) -> str:
    with pytest.raises(EdgekitError) as caught:
        call()
    return caught.value.code


def test_unknown_target_suggests_the_nearest(place):
    with pytest.raises(UsageError) as caught:
        optimize(request(place, target="rasberry-pi-4"))
    assert caught.value.code == "target.unknown"
    assert "raspberry-pi-4" in caught.value.hint


def test_file_that_is_no_model(place):
    (place / "net.onnx").write_bytes(b"nothing at all")
    assert code_of(lambda: optimize(request(place))) == "model.unloadable"


@pytest.mark.parametrize(
    "array",
    [np.zeros((8, 1, 5, 5), np.float32), np.full((8, 1, 12, 12), np.nan, np.float32), np.zeros((0, 1, 12, 12), np.float32)],
    ids=["shape", "nan", "empty"],
)
def test_data_that_does_not_fit(place, array):
    np.savez(place / "bare.npz", x=array)
    with pytest.raises(DataError):
        optimize(request(place))


def test_labels_of_another_length(place):
    np.savez(place / "bare.npz", x=images(8)["x"], labels=np.zeros(7, np.int64))
    with pytest.raises(DataError):
        optimize(request(place))


def test_metric_that_needs_labels(place):
    assert code_of(lambda: optimize(request(place, budget="top1_drop<=0.01"))) == "metric.needs_labels"


def test_onnx_for_a_litert_target(place):
    with pytest.raises(TargetError) as caught:
        optimize(request(place, target="android-arm64-litert"))
    assert caught.value.code == "target.source_unsupported"


def test_dry_run_plans_what_the_run_makes(place):
    prepared = prepare(request(place, effort="default"), Reporter(lambda _event: None))
    planned = [item.recipe.name for item in plan_candidates(prepared)]
    made = [candidate.name for candidate in optimize(request(place, effort="default")).candidates]
    assert made[: len(planned)] == planned  # what the search adds comes behind
    assert all(name.startswith("int8-") for name in made[len(planned) :])


def test_torch_factory(place):
    (place / "tiny.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def create():\n    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 4))\n"
        "def example_inputs():\n    return (torch.zeros(1, 1, 12, 12),)\n"
    )
    np.savez(place / "torch.npz", inputs=images(40)["x"])
    result = optimize(request(place, model=f"{place}/tiny.py:create", data=str(place / "torch.npz")))
    assert result.chosen.source.kind == "torch"
    assert result.baseline.lineage[0].name == "export-onnx"
    assert by_name(result)["int8-per-channel"].verdict.status != "failed"
