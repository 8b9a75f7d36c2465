"""The search: simulation against the runtime, the integer program, refinements, the guard on accuracy, the time limit."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import threadpoolctl
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler.calibration import BINS, METHODS, Statistics, collect_statistics
from edgekit.compiler.costs import Costs, LatencyTable, UnitCost, costs_from_table, measure_costs
from edgekit.compiler.graph import clean, encode, open_plain
from edgekit.compiler.lab import Lab
from edgekit.compiler.pipeline import optimize
from edgekit.compiler.preparation import OptimizeRequest
from edgekit.compiler.qdq import QdqGraph, narrow_weights
from edgekit.compiler.refine import apply, fit_scales
from edgekit.compiler.simulate import decibels
from edgekit.compiler.solve import choose, wire
from edgekit.dataset.data import Dataset, make_dataset
from edgekit.errors import UsageError
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.target import Int8Rules
from edgekit.target.load import profiles_dir

SIZE = 12


def network() -> onnx.ModelProto:
    """Conv, Relu, depthwise Conv, residual sum, pool, Gemm: 4 computing layers."""
    generator = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(generator.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32), name)

    weights = [
        weight("w0", 8, 3, 3, 3), weight("b0", 8), weight("w1", 8, 1, 3, 3), weight("b1", 8),
        weight("w2", 8, 8, 1, 1), weight("b2", 8), weight("w3", 5, 8), weight("b3", 5),
        numpy_helper.from_array(np.array([0, 8], np.int64), "shape"),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"], name="relu"),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], name="depthwise", pads=[1, 1, 1, 1], group=8),
        helper.make_node("Conv", ["c1", "w2", "b2"], ["c2"], name="pointwise"),
        helper.make_node("Add", ["r0", "c2"], ["s"], name="sum"),
        helper.make_node("GlobalAveragePool", ["s"], ["p"], name="pool"),
        helper.make_node("Reshape", ["p", "shape"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="head", transB=1),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])]
    graph = helper.make_graph(nodes, "network", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return make_dataset(
        {"x": np.random.default_rng(1).normal(0, 1, (48, 3, SIZE, SIZE)).astype(np.float32)}, source="made here"
    )


@pytest.fixture(scope="module")
def lab(data) -> Lab:
    made = Lab(
        proto=network(), calibration=data, rules=Int8Rules(), is_per_channel=True, reduce_range=False,
        seed=0, threads=1, host="here", sweep_seconds=5.0,
    )  # fmt: skip
    made.sweep(float("inf"))
    return made


def run(proto: onnx.ModelProto, data: Dataset) -> np.ndarray:
    return open_plain(encode(proto)).run(None, data.inputs)[0]


# --- simulation --------------------------------------------------------------------------------------------------------------


def test_simulation_with_everything_off_is_the_float_model(lab, data):
    np.testing.assert_allclose(lab.simulator.reference[0], run(network(), lab.simulator.data), atol=1e-5)


@pytest.mark.parametrize("kept", [(), ("first",), ("depthwise", "sum"), ("head",)])
def test_simulation_answers_like_the_written_model(lab, kept):
    units = [name for name in lab.units if name not in kept]
    written = lab.build(units, {}, {})
    found = run(written, lab.simulator.data)
    simulated = lab.simulator.outputs(lab.simulator.switches_of(units))[0]
    error = decibels(float(np.square(found - simulated).sum() / np.square(simulated).sum()))
    assert error > decibels(lab.simulator.noise(lab.simulator.switches_of(units))) + 3


def test_relu_that_the_quantizer_swallowed_is_there_when_switched_off(lab):
    assert not [node for node in lab.quantized.graph.node if node.op_type == "Relu"]
    assert lab.simulator.noise({"s"}) < 0.01


# --- the integer program ------------------------------------------------------------------------------------------------------


def costs(lab: Lab, conversion: float, **units: tuple[float, float]) -> Costs:
    default = (1.0, 1.0)
    made = {name: UnitCost(float_ms=units.get(name, default)[0], int8_ms=units.get(name, default)[1]) for name in lab.units}
    tensors = dict.fromkeys(name for unit in lab.units.values() for name in unit.activations)
    table = LatencyTable(host="", threads=1, entries={}, conversions={})
    prices = dict.fromkeys(tensors, conversion)
    return Costs(units=made, into=prices, back=prices, table=table)


def test_layer_that_int8_slows_down_stays_float(lab):
    paid = costs(lab, 0.01, first=(10, 4), depthwise=(2, 5), pointwise=(10, 4))
    chosen = lab.choose(paid).int8
    assert {"first", "pointwise"} <= chosen
    assert "depthwise" not in chosen


def test_conversions_can_cost_more_than_a_layer_saves(lab):
    assert lab.choose(costs(lab, 1.0, pointwise=(2.0, 1.0))).int8 == frozenset()
    assert "pointwise" in lab.choose(costs(lab, 0.1, pointwise=(2.0, 1.0))).int8


def test_limit_of_noise_is_kept_and_costs_time(lab):
    paid = costs(lab, 0.01, first=(10, 4), depthwise=(5, 2), pointwise=(10, 4), head=(3, 2))
    free = lab.choose(paid)
    bound = lab.choose(paid, limit=free.noise / 3)
    assert bound.noise <= free.noise / 3 * 1.001
    assert bound.saved_ms < free.saved_ms
    assert bound.int8 < free.int8 | bound.int8


def test_fixed_float_layers_stay_float(lab):
    paid = costs(lab, 0.01, first=(10, 4), pointwise=(10, 4))
    assert "first" not in lab.choose(paid, fixed_float=["first"]).int8


def test_matrix_product_needs_no_conversion_back(lab):
    wiring = wire(lab.proto, lab.units)
    paid = costs(lab, 0.3, head=(2.0, 1.0))
    found = choose(lab.units, wiring, paid, {})
    assert "head" in found.int8  # Q at its input alone: 0.3 against 1.0 saved


def test_table_gives_the_costs_it_was_made_of(lab, data):
    feeds = {"x": data.inputs["x"][:1]}
    measured = measure_costs(lab.proto, lab.quantized, lab.units, feeds, threads=1, host="here")
    again = costs_from_table(measured.table, lab.proto, lab.units, feeds)
    assert again is not None
    assert {name: item.float_ms for name, item in again.units.items()} == {
        name: item.float_ms for name, item in measured.units.items()
    }
    assert again.into == pytest.approx(measured.into)
    lacking = LatencyTable(host="", threads=1, entries={}, conversions=measured.table.conversions)
    assert costs_from_table(lacking, lab.proto, lab.units, feeds) is None


# --- the ladder --------------------------------------------------------------------------------------------------------------


def test_ladder_keeps_only_what_gains(lab):
    climbed = lab.climb(lab.units, ("calibrator", "scales", "feedback", "bias"))
    assert [step.name for step in climbed.ladder] == ["calibrator", "scales", "feedback", "bias"]
    for step in climbed.ladder:
        assert step.is_kept == (step.score_db - step.before_db >= 0.05)
    plain = lab.judge.noise(lab.simulator.switches_of(lab.units))
    assert climbed.noise <= plain


def test_feedback_rounds_better_than_to_nearest(lab):
    switches = lab.simulator.switches_of(lab.units)
    weights = [name for name in switches if name.startswith("weight:")]
    overrides = lab.replay(lab.units, {}, ("feedback",))
    assert lab.judge.noise(weights, overrides) < 0.8 * lab.judge.noise(weights)


def test_learned_rounding_is_no_worse_for_any_layer(lab):
    switches = lab.simulator.switches_of(lab.units)
    weights = [name for name in switches if name.startswith("weight:")]
    overrides = lab.replay(lab.units, {}, ("adaround",))
    assert lab.judge.noise(weights, overrides) < 0.9 * lab.judge.noise(weights)
    nearest = {item.values: lab.graph.array(item.values) for item in lab.graph.weights()}
    steps = [np.abs(values.astype(int) - overrides[name]).max() for name, values in nearest.items() if name in overrides]
    assert max(steps) == 1  # up or down, never further


def test_a_second_climb_goes_on_where_the_first_ended(lab):
    first = lab.climb(lab.units, ("scales", "bias"))
    second = lab.climb((), ("adaround", "bias"), start=first)
    assert second.units == first.units
    assert second.steps[: len(first.steps)] == first.steps
    assert [step.name for step in second.ladder] == ["scales", "bias", "adaround", "bias"]
    assert second.noise <= first.noise
    assert lab.seconds_of_adaround(lab.units) > lab.seconds_of_adaround(list(lab.units)[:1]) >= 0


def test_leaving_one_layer_in_float_is_measured_with_all_others_in_int8(lab):
    lab.sweep_disabled(lab.units, None, float("inf"))
    assert set(lab.disabled) == set(lab.units)
    name = next(iter(lab.units))
    others = [unit for unit in lab.units if unit != name]
    assert lab.disabled[name] == pytest.approx(lab.simulator.noise(lab.simulator.switches_of(others)))
    record = next(item for item in lab.layer_records(None, lab.units) if item.layer == name)
    assert record.disable_one_db == pytest.approx(decibels(lab.disabled[name]))


def test_steps_sum_on_one_thread_so_that_their_bits_do_not_depend_on_the_machine(lab, monkeypatch):
    seen = []

    def look(_setting) -> dict:
        seen.extend(item["num_threads"] for item in threadpoolctl.threadpool_info() if item["user_api"] == "blas")
        return {}

    monkeypatch.setattr("edgekit.compiler.lab.correct_biases", look)
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        lab._step("bias", frozenset(lab.units), {})
    assert seen
    assert set(seen) == {1}


def test_bias_correction_centres_the_answers(lab):
    switches = lab.simulator.switches_of(lab.units)
    reference = lab.simulator.reference[0].mean(axis=0)
    before = np.abs(lab.simulator.outputs(switches)[0].mean(axis=0) - reference).sum()
    after = np.abs(lab.simulator.outputs(switches, lab.replay(lab.units, {}, ("bias",)))[0].mean(axis=0) - reference).sum()
    assert after < 0.2 * before


def test_overrides_in_the_file_answer_like_the_simulation(lab):
    overrides = lab.replay(lab.units, {}, ("feedback", "bias"))
    simulated = lab.simulator.noise(lab.simulator.switches_of(lab.units), overrides)
    found = run(lab.build(lab.units, {}, overrides), lab.simulator.data)
    assert decibels(lab.simulator.noise_of([found])) == pytest.approx(decibels(simulated), abs=1.5)


def test_scales_never_raise_the_squared_error(lab):
    changed = fit_scales(lab.graph, lab.originals, ["first"])
    graph = QdqGraph(lab.quantized)
    weight = next(item for item in graph.weights() if item.layer == "first")

    def error(scale: np.ndarray, values: np.ndarray) -> np.ndarray:
        wide = scale.reshape(-1, 1, 1, 1)
        return np.square(values * wide - lab.originals["w0"]).sum(axis=(1, 2, 3))

    before = error(graph.array(weight.scale), graph.array(weight.values))
    assert (error(changed[weight.scale], changed[weight.values]) <= before + 1e-9).all()


def test_narrow_weights_fit_seven_bits_and_answer_nearly_the_same(lab, data):
    model = lab.build(lab.units, {}, {})
    before = run(model, data)
    narrow_weights(model, ["first", "pointwise"])
    graph = QdqGraph(model)
    largest = {item.layer: int(np.abs(graph.array(item.values).astype(int)).max()) for item in graph.weights()}
    assert largest["first"] <= 64
    assert largest["pointwise"] <= 64
    assert largest["depthwise"] > 64
    assert decibels(float(np.square(run(model, data) - before).sum() / np.square(before).sum())) > 25


def test_apply_leaves_the_rest_alone(lab):
    model = lab.build(lab.units, {}, {})
    same = encode(model)
    apply(model, {}, lab.originals)
    assert encode(model) == same


# --- calibrators -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_ranges_lie_within_what_was_seen(data, method):
    for item in collect_statistics(network(), data).values():
        low, high = item.range_by(method)
        assert item.low - 1e-6 <= low <= 0 <= high <= item.high + 1e-6


def test_clipping_methods_cut_a_thin_tail():
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(0, 0.05, 200_000), generator.uniform(-10, 10, 40)])
    counts = np.histogram(values, BINS, (values.min(), values.max()))[0]
    item = Statistics(float(values.min()), float(values.max()), counts)
    assert item.range_by("minmax")[1] > 9.9
    assert item.range_by("percentile")[1] < 8
    assert item.range_by("entropy")[1] < 5
    assert item.sqnr_db(*item.range_by("mse")) > item.sqnr_db(*item.range_by("minmax"))
    assert item.clipped(-1.0, 1.0) == pytest.approx(36 / 200_040, rel=0.2)


def test_statistics_do_not_depend_on_batches(data):
    whole = collect_statistics(network(), data, batch_size=48)["c1"]
    single = collect_statistics(network(), data.select(np.arange(48)), batch_size=5, tensors=["c1"])["c1"]
    assert (whole.low, whole.high) == pytest.approx((single.low, single.high))
    assert np.abs(whole.counts - single.counts).sum() <= 4  # sums in another order may cross an edge of a bin


# --- graph forms -------------------------------------------------------------------------------------------------------------


def test_hard_swish_in_pieces_becomes_one():
    scalars = [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in (("t", 3), ("z", 0), ("s", 6))]
    nodes = [
        helper.make_node("Add", ["x", "t"], ["a"]),
        helper.make_node("Clip", ["a", "z", "s"], ["c"]),
        helper.make_node("Mul", ["x", "c"], ["m"]),
        helper.make_node("Div", ["m", "s"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    proto = helper.make_model(
        helper.make_graph(nodes, "swish", values[:1], values[1:], scalars),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    feeds = {"x": np.linspace(-5, 5, 8, dtype=np.float32).reshape(2, 4)}
    _cleaned, notes = clean(proto, feeds)
    assert any(note.startswith("activations:") and "+1 HardSwish" in note for note in notes)
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    next(item for item in other.graph.initializer if item.name == "t").CopyFrom(
        numpy_helper.from_array(np.array(2, np.float32), "t")
    )
    assert not any("HardSwish" in note for note in clean(other, feeds)[1])


# --- whole runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("search")
    onnx.save(network(), folder / "model.onnx")
    np.savez(folder / "data.npz", **data.inputs)
    return folder


def request(files: Path, name: str, **more) -> OptimizeRequest:
    model, samples = str(files / "model.onnx"), str(files / "data.npz")
    return OptimizeRequest(model=model, target="host", data=samples, out=files / name, metric="sqnr_db", **more)


def test_run_finds_and_explains_mixed_precision(files):
    result = optimize(request(files, "found"))
    mixed = next((item for item in result.candidates if item.name == "int8-mixed"), None)
    if mixed is None:
        assert any("no layer is faster in int8" in note for note in result.findings.notes)
        return
    settings = mixed.lineage[-1].settings
    kept = set(json.loads(settings["float_nodes"]))
    assert {record.layer for record in result.findings.layers if not record.is_int8} == kept
    assert [step.name for step in result.findings.ladder] == ["calibrator", "scales", "feedback", "bias"]


def test_accuracy_is_bought_back_with_float_layers(files):
    result = optimize(request(files, "guarded", budget="sqnr_db>=45"))
    assert result.is_budget_met
    assert result.chosen.evaluation.value >= 45


def test_time_limit_returns_the_baseline_at_least(files):
    result = optimize(request(files, "hurried", time_limit=0.001))
    assert result.chosen.name == "fp32"
    reasons = {item.verdict.reason for item in result.candidates if item.verdict.status == "failed"}
    assert reasons == {"not made: the time limit of 0.001 s came first"}
    assert (files / "hurried" / "model.onnx").is_file()


def test_latency_table_of_another_machine_decides(files):
    optimize(request(files, "measured"))
    path = files / "measured" / "latency-table.json"
    table = decode_json(path.read_bytes(), LatencyTable, name="table")
    slow = {key: value * (100 if key.endswith("int8") else 1) + 0.01 for key, value in table.entries.items()}
    other = files / "other.json"
    other.write_bytes(encode_json(msgspec.structs.replace(table, entries=slow, host="slow in int8")))
    result = optimize(request(files, "there", latency_table=other))
    assert "int8-mixed" not in {item.name for item in result.candidates}
    assert "what runs in int8 was chosen by the latency table of slow in int8" in result.findings.notes


def test_a_target_can_bring_its_latency_table(files):
    optimize(request(files, "first"))
    table = decode_json((files / "first" / "latency-table.json").read_bytes(), LatencyTable, name="table")
    (files / "of-board.json").write_bytes(encode_json(msgspec.structs.replace(table, host="the board")))
    text = (profiles_dir() / "x86-64-avx512-vnni.toml").read_text()
    (files / "board.toml").write_text('latency_table = "of-board.json"\n' + text.replace("x86-64-avx512-vnni", "board"))
    settings = {"model": str(files / "model.onnx"), "data": str(files / "data.npz"), "metric": "sqnr_db"}
    result = optimize(OptimizeRequest(**settings, target=str(files / "board.toml"), out=files / "for-board"))
    assert "what runs in int8 was chosen by the latency table of the board" in result.findings.notes
    (files / "of-board.json").unlink()
    with pytest.raises(UsageError, match=r"of-board\.json: no latency table"):
        optimize(OptimizeRequest(**settings, target=str(files / "board.toml"), out=files / "without"))


def test_wrong_latency_table_is_refused(files):
    with pytest.raises(UsageError, match="no latency table"):
        optimize(request(files, "wrong", latency_table=files / "data.npz"))


def test_channels_are_scaled_where_that_gains(files, tmp_path):
    """Two convolutions whose channels differ by three orders of magnitude between them."""
    random, spread = np.random.default_rng(0), np.geomspace(0.03, 30, 8).astype(np.float32)
    weights = {
        "w1": random.normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32) * spread[:, None, None, None],
        "w2": random.normal(0, 0.3, (5, 8, 1, 1)).astype(np.float32) / spread[None, :, None, None],
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="second"),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], name="pool"),
        helper.make_node("Flatten", ["d"], ["y"], name="flat"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])]
    tensors = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "network", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "uneven.onnx")
    settings = {
        "model": str(tmp_path / "uneven.onnx"), "target": "host", "data": str(files / "data.npz"), "metric": "sqnr_db",
        "budget": "sqnr_db>=60",
    }  # fmt: skip
    optimize(OptimizeRequest(**settings, out=tmp_path / "here"))
    table = decode_json((tmp_path / "here" / "latency-table.json").read_bytes(), LatencyTable, name="table")
    fast = {key: 0.1 if key.endswith("int8") else 1.0 for key in table.entries}
    free = dict.fromkeys(table.conversions, (0.0, 0.0))
    other = tmp_path / "other.json"
    other.write_bytes(encode_json(msgspec.structs.replace(table, entries=fast, conversions=free, host="fast in int8")))
    result = optimize(OptimizeRequest(**settings, out=tmp_path / "out", latency_table=other))
    assert not [note for note in result.findings.notes if "stopped" in note]
    step = result.findings.ladder[0]
    assert step.name == "equalize-channels(rule=activations, strength=0.5)"
    assert step.is_kept
    assert step.score_db > step.before_db + 10
    candidates = {item.name: item for item in result.candidates}
    assert [item.name for item in candidates["int8-mixed"].lineage][-2:] == ["equalize-channels", "quantize-planned"]
    assert candidates["int8-mixed"].evaluation.value > candidates["int8-per-channel"].evaluation.value
    assert any(record.disable_one_db is not None for record in result.findings.layers)
