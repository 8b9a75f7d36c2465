"""Scales of the previous release: what fits is kept exactly, the rest stays; an update decides only if it is smaller."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_graphs import convolutional, images, save

from edgekit.bundle.delta.make import make_delta
from edgekit.compiler import pipeline
from edgekit.compiler.calibration import collect_ranges
from edgekit.compiler.explain import read_explanation, run_again
from edgekit.compiler.gate import Measured, judge, parse_budget
from edgekit.compiler.graph import clean, encode, open_plain
from edgekit.compiler.pipeline import optimize
from edgekit.compiler.preparation import OptimizeRequest
from edgekit.compiler.previous import find_previous, keep_scales, read_previous
from edgekit.compiler.qdq import QdqGraph, QdqPlan, write_qdq
from edgekit.dataset.data import make_dataset
from edgekit.errors import ArtifactError, UsageError
from edgekit.schema.digest import digest_file
from edgekit.schema.measurement import HostFingerprint, LatencyReport
from edgekit.schema.target import Int8Rules


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(pipeline, "TIMING_SECONDS", {"fast": 0.02, "default": 0.02, "max": 0.02})


def float_model(*, drift: float = 0.0, factor: float = 1.0) -> onnx.ModelProto:
    """The cleaned network, its weights moved by a share of their spread or scaled."""
    made = convolutional(channels=16)
    for item in made.graph.initializer:
        values = numpy_helper.to_array(item)
        if item.name.startswith("w"):
            moved = values + np.random.default_rng(9).normal(size=values.shape) * values.std() * drift
            item.CopyFrom(numpy_helper.from_array((moved * factor).astype(np.float32), item.name))
    return clean(made, images(8))[0]


def quantized(proto: onnx.ModelProto, *, louder: float = 1.0, **rules) -> onnx.ModelProto:
    """In int8; the samples of another day may be a little louder."""
    data = make_dataset({name: values * np.float32(louder) for name, values in images(32).items()}, source="here")
    plan = QdqPlan(ranges=collect_ranges(proto, data), rules=Int8Rules(**rules), is_per_channel=True)
    return write_qdq(proto, plan)


def arrays(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}


def scalars(proto: onnx.ModelProto) -> list[str]:
    """Parameters of activations that a node reads."""
    used = {name for node in proto.graph.node for name in node.input}
    found = [name for name, values in arrays(proto).items() if name in used and values.ndim == 0]
    return [name for name in found if name.endswith(("_scale", "_zero_point"))]


def sqnr_db(proto: onnx.ModelProto, reference: onnx.ModelProto) -> float:
    feeds = images(32, seed=5)
    wanted = open_plain(encode(reference)).run(None, feeds)[0].astype(np.float64)
    noise = open_plain(encode(proto)).run(None, feeds)[0] - wanted
    return float(10 * np.log10((wanted**2).sum() / (noise**2).sum()))


def test_scales_that_fit_are_the_old_ones_to_the_bit():
    old, plain = quantized(float_model()), float_model(drift=0.003)
    new = quantized(plain)
    own = arrays(new)
    kept = keep_scales(new, arrays(plain), QdqGraph(old))
    before, after = arrays(old), arrays(new)
    assert kept.activations == kept.all_activations > 3
    assert kept.channels > kept.all_channels // 2
    for name in scalars(new):
        assert after[name] == before[name], name
    for weight in QdqGraph(new).weights():
        is_old = after[weight.scale] == before[weight.scale]
        assert (is_old | (after[weight.scale] == own[weight.scale])).all()
        share = own[weight.scale] / before[weight.scale]
        assert (is_old == ((share <= 1.02) & (share >= 0.5))).all()
        float_values = arrays(plain)[weight.values.removesuffix("_quantized")]
        shape = [-1 if place == weight.axis else 1 for place in range(float_values.ndim)]
        wanted = np.clip(
            np.round(float_values.astype(np.float64) / before[weight.scale].astype(np.float64).reshape(shape)), -127, 127
        )
        assert (after[weight.values] == wanted)[np.broadcast_to(is_old.reshape(shape), wanted.shape)].all()


def test_channels_that_grew_or_shrank_too_much_get_a_scale_of_their_own():
    old, plain = quantized(float_model()), float_model(drift=0.1)
    new = quantized(plain)
    own, before = arrays(new), arrays(old)
    keep_scales(new, arrays(plain), QdqGraph(old))
    decided = []
    for weight in QdqGraph(new).weights():
        share = own[weight.scale] / before[weight.scale]
        is_old = arrays(new)[weight.scale] == before[weight.scale]
        assert (is_old == ((share <= 1.02) & (share >= 0.5))).all(), share
        decided += is_old.tolist()
    assert 0.2 < np.mean(decided) < 0.8


def test_kept_model_answers_as_well_and_keeps_its_shapes():
    plain = float_model(drift=0.003)
    own = quantized(plain)
    new = quantized(plain)
    keep_scales(new, arrays(plain), QdqGraph(quantized(float_model())))
    assert arrays(own).keys() == arrays(new).keys()
    for name, values in arrays(own).items():  # a scalar that becomes a list stops the runtime's fusions
        assert arrays(new)[name].shape == values.shape, name
    assert sqnr_db(own, plain) > 25
    assert sqnr_db(new, plain) > sqnr_db(own, plain) - 3  # a bias on a wrong scale costs tens of dB


def test_bias_follows_both_scales():
    plain = float_model(drift=0.003)
    new = quantized(plain)
    graph = QdqGraph(new)
    assert "x_scale" in {item.activation for item in graph.weights() if item.bias}
    biases = {item.layer: graph.array(item.bias) * arrays(new)[f"{item.bias}_scale"] for item in graph.weights() if item.bias}
    own = arrays(new)["x_scale"]
    keep_scales(new, arrays(plain), QdqGraph(quantized(float_model(), louder=1.04)))
    assert arrays(new)["x_scale"] == pytest.approx(1.04 * own, rel=1e-3)
    after = QdqGraph(new)
    for item in after.weights():
        if item.bias:
            scale = arrays(new)[f"{item.bias}_scale"]
            np.testing.assert_allclose(scale, after.array(item.scale) * after.array(item.activation), rtol=1e-5)
            np.testing.assert_allclose(after.array(item.bias) * scale, biases[item.layer], atol=float(scale.max()))


@pytest.mark.parametrize("factor", [2.5, 0.3])
def test_weights_out_of_range_keep_their_own_scale(factor):
    plain = float_model(factor=factor)
    new = quantized(plain)
    own = arrays(new)
    try:
        kept = keep_scales(new, arrays(plain), QdqGraph(quantized(float_model())))
        assert kept.channels == 0
    except ArtifactError as error:
        assert error.code == "previous.nothing_kept"  # noqa: PT017  both are right: activations may fit
    for weight in QdqGraph(new).weights():
        assert (arrays(new)[weight.scale] == own[weight.scale]).all()
        assert (arrays(new)[weight.values] == own[weight.values]).all()


@pytest.mark.parametrize(("louder", "is_kept"), [(1.9, True), (2.2, False), (0.93, True), (0.87, False)])
def test_activation_range_against_the_old_one(louder, is_kept):
    plain = float_model()
    new = quantized(plain)
    own = arrays(new)["x_scale"]
    old = quantized(float_model(), louder=louder)
    keep_scales(new, arrays(plain), QdqGraph(old))
    assert arrays(new)["x_scale"] == (arrays(old)["x_scale"] if is_kept else own)


def test_activation_of_another_type_is_not_kept():
    plain = float_model(drift=0.003)
    new = quantized(plain)
    kept = keep_scales(new, arrays(plain), QdqGraph(quantized(float_model(), activations="int8")))
    assert kept.activations == 0
    assert kept.channels > 0


def test_other_network_has_nothing_to_keep():
    plain = float_model()
    other = quantized(plain)
    renamed = onnx.ModelProto()
    renamed.CopyFrom(other)
    names = {item.name: f"other.{item.name}" for item in renamed.graph.initializer}
    for item in renamed.graph.initializer:
        item.name = names[item.name]
    for node in renamed.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    with pytest.raises(ArtifactError) as caught:
        keep_scales(other, arrays(plain), QdqGraph(renamed))
    assert caught.value.code == "previous.nothing_kept"


# --- the whole run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    onnx.save(convolutional(channels=64), tmp_path / "net.onnx")
    for name, seed in (("a", 0), ("b", 1)):
        np.savez(tmp_path / f"{name}.npz", **images(64, seed=seed))
    return tmp_path


def run(place, out, *, data="a", **changes):
    request = OptimizeRequest(
        model=str(place / "net.onnx"), target="x86-64-avx512-vnni", data=str(place / f"{data}.npz"), budget="sqnr_db>=5",
        evaluation=str(place / "a.npz"), effort="fast", out=place / out, **changes,
    )  # fmt: skip
    return optimize(request)


def static_int8(place):
    return place / "old" / "candidates" / "int8-per-channel" / "model.onnx"


def test_run_offers_the_kept_candidate_and_makes_it_again(place):
    run(place, "old")
    old = static_int8(place) if static_int8(place).is_file() else place / "old" / "model.onnx"
    sizes = {}

    def update_bytes(previous, model):
        made = make_delta(previous, model)
        sizes[model.parent.name] = len(made.content) if made else model.stat().st_size
        return sizes[model.parent.name]

    result = run(place, "new", data="b", previous=old, update_bytes=update_bytes)
    found = [item for item in result.candidates if item.name.endswith("-kept-scales")]
    assert len(found) == 1
    kept = found[0]
    step = kept.lineage[-1]
    assert "activation scales" in step.notes[-1]
    assert step.settings["previous_digest"] == digest_file(old)
    assert kept.evaluation is not None
    assert kept.latency is not None
    base = next(item for item in result.candidates if item.name == kept.name.removesuffix("-kept-scales"))
    assert "previous" not in base.lineage[-1].settings
    smallest = min(sizes.values())
    assert len(sizes) == 2
    assert smallest < 0.5 * kept.artifact.size_bytes  # the weights are the same: little is left to send
    checks = run_again(read_explanation(place / "new", kept.name))
    assert all(check.expected == check.found for check in checks), checks
    old.write_bytes(old.read_bytes() + b"\0")
    again = run_again(read_explanation(place / "new", kept.name))
    assert again[-1].found is None
    assert "previous" in again[-1].reason or "scales came from" in again[-1].reason


def test_run_without_previous_has_no_such_candidate_and_no_such_setting(place):
    result = run(place, "plain")
    assert not [item.name for item in result.candidates if "kept-scales" in item.name]
    assert not [step.settings for item in result.candidates for step in item.lineage if "previous" in step.settings]


def test_previous_that_is_no_quantized_model(place, tmp_path):
    for path, code in ((place / "net.onnx", "previous.not_quantized"), (tmp_path, "previous.unreadable")):
        with pytest.raises(UsageError) as caught:
            find_previous(path)
        assert caught.value.code == code


def test_previous_that_changed(place):
    save(convolutional(), place / "q.onnx")
    with pytest.raises(ArtifactError) as caught:
        read_previous(str(place / "q.onnx"), "sha256:" + "0" * 64)
    assert caught.value.code == "previous.changed"


# --- the gate ---------------------------------------------------------------------------------------------------------------

HOST = HostFingerprint(
    arch="x86-64", cpu="", isa=(), cores=1, ram_mb=1, os="", python="", runtime="onnxruntime", runtime_version="1"
)  # fmt: skip


def measured(name: str, ratio: float, *, update: int | None = None, size: int = 1000) -> Measured:
    report = LatencyReport(
        host=HOST, is_on_target=True, threads=1, warmup_runs=1, runs=9, p50_ms=ratio, p90_ms=ratio, p99_ms=ratio, mean_ms=ratio,
        p50_low_ms=ratio, p50_high_ms=ratio, noise=0.01, ratio=ratio, ratio_low=ratio * 0.999, ratio_high=ratio * 1.001,
    )  # fmt: skip
    return Measured(name=name, size_bytes=size, latency=report, update_bytes=update)


def chosen(*others: Measured):
    origin = dataclasses.replace(measured("fp32", 1.0, size=4000), update_bytes=None)
    return judge([origin, *others], parse_budget("size_mb<=10"), baseline="fp32")


def test_tie_goes_to_the_smaller_update_and_says_so():
    found = chosen(measured("int8", 0.5, update=9000), measured("int8-kept-scales", 0.501, update=3000))
    assert found.chosen == "int8-kept-scales"
    reason = found.verdicts["int8-kept-scales"].reason
    assert "update is the smallest" in reason
    assert "3.0 kB" in reason
    assert "9.0 kB" in found.verdicts["int8"].reason


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        (measured("int8-kept-scales", 0.501, update=9500), "a larger update"),
        (measured("int8-kept-scales", 0.501, update=8950), "hardly smaller"),
        (measured("int8-kept-scales", 0.6, update=3000), "slower"),
        (measured("int8-kept-scales", 0.501, update=3000, size=1200), "a larger file"),
    ],
)
def test_kept_scales_are_not_preferred(kept, why):
    assert chosen(measured("int8", 0.5, update=9000), kept).chosen == "int8", why


def test_nothing_is_preferred_to_a_winner_whose_update_nobody_measured():
    assert chosen(measured("int8-mixed", 0.5), measured("int8-kept-scales", 0.501, update=1)).chosen == "int8-mixed"
