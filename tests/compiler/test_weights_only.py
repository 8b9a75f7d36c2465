"""Smaller files that compute in float32: half-precision storage and few-bit weights of matrix products."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler.graph import read_onnx
from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.compiler.passes.on_onnx.weights_only import HalveWeights, QuantizeWeights
from edgekit.dataset.data import make_dataset
from edgekit.errors import ArtifactError
from edgekit.runtime.ort import load_onnxruntime
from edgekit.target.load import load_target

FEEDS = {"x": np.random.default_rng(1).normal(0, 1, (4, 64)).astype(np.float32)}


def save(folder, scale=1.0, kind="MatMul") -> WorkModel:
    weight = (np.random.default_rng(0).normal(0, 0.2, (64, 48)) * scale).astype(np.float32)
    node = helper.make_node(kind, ["x", "w"], ["y"], name="product")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 48])]
    graph = helper.make_graph([node], "product", inputs, outputs, [numpy_helper.from_array(weight, "w")])
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return WorkModel(path=path, format="onnx", precision="fp32", lineage=())


def context(folder) -> PassContext:
    folder.mkdir(exist_ok=True)
    data = make_dataset(FEEDS, source="made here")
    return PassContext(target=load_target("host"), calibration=data, work_dir=folder, seed=0, effort="max")


def answers(model: WorkModel) -> np.ndarray:
    return load_onnxruntime().InferenceSession(str(model.path)).run(None, FEEDS)[0]


def test_half_the_size_and_nearly_the_same_answers(tmp_path):
    model = save(tmp_path)
    made = HalveWeights().run(model, context(tmp_path / "half"))
    assert made.path.stat().st_size < 0.6 * model.path.stat().st_size
    np.testing.assert_allclose(answers(made), answers(model), rtol=0, atol=5e-3)
    assert [node.op_type for node in read_onnx(made.path).graph.node] == ["Cast", "MatMul"]


def test_weights_beyond_half_precision_stay(tmp_path):
    with pytest.raises(ArtifactError, match="fits float16"):
        HalveWeights().run(save(tmp_path, scale=1e6), context(tmp_path / "half"))


def test_fitted_zero_points_are_closer_with_outliers(tmp_path):
    model = save(tmp_path)
    proto = onnx.load(model.path)
    values = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    values[::16] = np.abs(values[::16]) * 3  # one large weight in every half block, all of one sign
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w"))
    onnx.save(proto, model.path)
    before = answers(model)
    error = {}
    for algorithm in ("nearest", "hqq"):
        made = QuantizeWeights(bits=4, algorithm=algorithm).run(model, context(tmp_path / algorithm))
        assert made.lineage[-1].settings["algorithm"] == algorithm
        error[algorithm] = float(np.square(answers(made) - before).sum())
    assert error["hqq"] < 0.7 * error["nearest"]


@pytest.mark.parametrize(("bits", "share", "floor"), [(8, 0.5, 35), (4, 0.35, 15)])
def test_few_bits_are_small_and_close(tmp_path, bits, share, floor):
    model = save(tmp_path)
    made = QuantizeWeights(bits=bits).run(model, context(tmp_path / "few"))
    assert made.path.stat().st_size < share * model.path.stat().st_size
    before, after = answers(model), answers(made)
    assert 10 * np.log10(np.square(before).sum() / np.square(before - after).sum()) > floor


def test_model_without_matrix_products_is_refused(tmp_path):
    assert "no matrix products" in QuantizeWeights(bits=4).find_obstacle(save(tmp_path, kind="Gemm"), context(tmp_path / "few"))
