from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from small_graphs import branching, convolutional, images, matrix, weightless

from edgekit.compiler.graph import facts_of, normalize, read_onnx, run_once, write_onnx
from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.optimize import OptimizeGraph
from edgekit.compiler.passes.on_onnx.quantize_dynamic import QuantizeDynamic
from edgekit.compiler.passes.on_onnx.quantize_static import QuantizeStatic
from edgekit.dataset.data import make_dataset
from edgekit.errors import ArtifactError
from edgekit.evaluation.metric import sqnr_db
from edgekit.schema.digest import digest_file
from edgekit.schema.target import Int8Rules, TargetProfile


def make_target(**rules) -> TargetProfile:
    return TargetProfile(
        name="test",
        title="Test",
        arch="x86-64",
        cpu="c",
        isa=(),
        cores=1,
        ram_mb=100,
        runtime="onnxruntime",
        int8=Int8Rules(**rules),
        channel_multiple=8,
        sources={},
    )


def make_context(folder: Path, arrays=None, **rules) -> PassContext:
    folder.mkdir(parents=True, exist_ok=True)
    data = make_dataset(arrays or images(), source="made here")
    return PassContext(target=make_target(**rules), calibration=data, work_dir=folder, seed=0, effort="fast")


def make_model(proto: onnx.ModelProto, folder: Path) -> WorkModel:
    write_onnx(normalize(proto), folder / "source.onnx")
    return WorkModel(path=folder / "source.onnx", format="onnx", precision="fp32", lineage=())


def initializers(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {item.name: onnx.numpy_helper.to_array(item) for item in proto.graph.initializer}


@pytest.fixture
def model(tmp_path) -> WorkModel:
    plain = make_model(convolutional(channels=16), tmp_path)
    return OptimizeGraph().run(plain, make_context(tmp_path / "optimize"))


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"activations": "int8"},
        {"activations": "int8", "activation_symmetric": True},
        {"weights": "uint8", "weight_symmetric": False, "per_channel": False},
        {"reduce_range": True},
    ],
)
def test_int8_follows_the_targets_rules(model, tmp_path, rules):
    context = make_context(tmp_path / "q", **rules)
    step = QuantizeStatic(is_per_channel=context.target.int8.per_channel)
    assert step.find_obstacle(model, context) is None
    result = step.run(model, context)
    proto = read_onnx(result.path)
    values = initializers(proto)
    weight = (
        values["w2_quantized"] if "w2_quantized" in values else next(v for k, v in values.items() if "w2" in k and v.ndim == 4)
    )
    assert weight.dtype == np.dtype(context.target.int8.weights)
    if rules.get("reduce_range"):
        assert np.abs(weight.astype(int)).max() <= 64
    else:
        assert np.ptp(weight.astype(int)) > 128
    zero_points = [values[n.input[2]] for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    assert {z.dtype for z in zero_points} == {np.dtype(context.target.int8.activations)}
    if rules.get("activation_symmetric"):
        assert all((z == 0).all() for z in zero_points)
    feeds = images(16, seed=5)
    assert sqnr_db(run_once(read_onnx(model.path), feeds)[0], run_once(proto, feeds)[0]) > 15


def test_scales_per_channel_or_per_tensor(model, tmp_path):
    for is_per_channel, shape in ((True, (16,)), (False, ())):
        result = QuantizeStatic(is_per_channel=is_per_channel).run(model, make_context(tmp_path / str(is_per_channel)))
        values = initializers(read_onnx(result.path))
        assert next(v for k, v in values.items() if k.startswith("w2") and k.endswith("scale")).shape == shape


def test_answers_stay_float_and_names_stay(model, tmp_path):
    result = QuantizeStatic(is_per_channel=True).run(model, make_context(tmp_path / "q"))
    before, after = read_onnx(model.path), read_onnx(result.path)
    assert [item.name for item in before.graph.output] == [item.name for item in after.graph.output]
    assert [node.op_type for node in after.graph.node if "logits" in node.output] == ["Gemm"]
    assert "3 of 3 computing layers are int8" in result.lineage[-1].notes


def test_edges_stay_in_fp32(model, tmp_path):
    result = QuantizeStatic(is_per_channel=True, kept="edges").run(model, make_context(tmp_path / "q"))
    values = initializers(read_onnx(result.path))
    assert values["w3"].dtype == np.float32
    assert "1 of 3 computing layers are int8" in result.lineage[-1].notes


def test_edges_of_a_model_without_inner_layers(tmp_path):
    source = make_model(matrix(), tmp_path)
    assert "no layers between" in QuantizeStatic(is_per_channel=True, kept="edges").find_obstacle(
        source, make_context(tmp_path)
    )


def test_same_input_gives_the_same_bytes(model, tmp_path):
    for index, step in enumerate((QuantizeStatic(is_per_channel=True, method="mse"), QuantizeDynamic())):
        first = step.run(model, make_context(tmp_path / f"{index}-1"))
        second = step.run(model, make_context(tmp_path / f"{index}-2"))
        assert digest_file(first.path) == digest_file(second.path)


def test_lineage_names_parent_settings_and_versions(model, tmp_path):
    result = QuantizeStatic(is_per_channel=True).run(model, make_context(tmp_path / "q"))
    step = result.lineage[-1]
    assert (step.parent, step.output) == (digest_file(model.path), digest_file(result.path))
    assert set(step.versions) == {"onnx", "onnxruntime"}
    assert step.settings["weights"] == "int8 symmetric"
    assert len(result.lineage) == len(model.lineage) + 1


def test_dynamic_quantizes_matrices(tmp_path):
    random = np.random.default_rng(0)
    arrays = {"left": random.normal(size=(30, 6)).astype(np.float32), "right": random.normal(size=(30, 10)).astype(np.float32)}
    source = make_model(matrix(hidden=256), tmp_path)
    context = make_context(tmp_path / "d", arrays)
    result = QuantizeDynamic().run(source, context)
    assert facts_of(read_onnx(result.path)).operators["MatMulInteger"] == 2
    assert result.path.stat().st_size < source.path.stat().st_size / 2
    feeds = {name: array[:4] for name, array in arrays.items()}
    assert sqnr_db(run_once(read_onnx(source.path), feeds)[0], run_once(read_onnx(result.path), feeds)[0]) > 25


def test_dynamic_that_grows_is_refused(tmp_path):
    source = make_model(convolutional(channels=1), tmp_path)
    with pytest.raises(ArtifactError) as caught:
        QuantizeDynamic().run(source, make_context(tmp_path / "d"))
    assert caught.value.code == "quantization.grew"


@pytest.mark.parametrize(
    ("proto", "words"),
    [
        (weightless(), "nothing to quantize"),
        (branching(), "subgraphs"),
        (convolutional(dtype=np.float16), "float16"),
    ],
)
def test_obstacle_is_said(tmp_path, proto, words):
    source = make_model(proto, tmp_path)
    for step in (QuantizeStatic(is_per_channel=True), QuantizeDynamic()):
        assert words in step.find_obstacle(source, make_context(tmp_path / "q"))


def test_quantized_model_is_not_quantized_again(model, tmp_path):
    once = QuantizeStatic(is_per_channel=True).run(model, make_context(tmp_path / "q"))
    assert "already quantized" in QuantizeStatic(is_per_channel=True).find_obstacle(once, make_context(tmp_path / "r"))


def test_per_channel_on_a_target_without_it(model, tmp_path):
    context = make_context(tmp_path / "q", per_channel=False)
    assert "one scale per channel" in QuantizeStatic(is_per_channel=True).find_obstacle(model, context)
