from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from small_graphs import branching, build, constant_weights, convolutional, images, matrix, save, value

from edgekit.compiler.calibration import collect_ranges
from edgekit.compiler.graph import clean, encode, facts_of, lift_opset, normalize, read_onnx, run_once
from edgekit.dataset.data import make_dataset
from edgekit.errors import ArtifactError, DataError


def test_file_that_is_not_onnx(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"this is not a model" * 10)
    with pytest.raises(ArtifactError) as caught:
        read_onnx(path)
    assert caught.value.code == "model.unloadable"
    assert "model.onnx" in caught.value.message


def test_file_that_is_empty_or_cut_off(tmp_path):
    whole = encode(convolutional())
    for size in (0, len(whole) // 2):
        path = tmp_path / f"{size}.onnx"
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError) as caught:
            read_onnx(path)
        assert caught.value.code == "model.unloadable"


def test_external_data_is_read_in(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(convolutional(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").is_file()
    inside = encode(normalize(read_onnx(path)))
    assert len(inside) > (tmp_path / "weights.bin").stat().st_size
    (tmp_path / "weights.bin").unlink()
    expected = run_once(convolutional(), images())
    assert np.array_equal(run_once(onnx.load_from_string(inside), images())[0], expected[0])


def test_external_data_is_missing(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(convolutional(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ArtifactError) as caught:
        read_onnx(path)
    assert caught.value.code == "model.external_data"


def test_constant_weights_are_lifted():
    before = facts_of(constant_weights())
    after = facts_of(normalize(constant_weights()))
    assert (before.constants, after.constants) == (7, 0)
    assert before.parameters == after.parameters == facts_of(convolutional()).parameters


def test_weights_in_subgraphs_are_seen():
    facts = facts_of(branching())
    assert facts.parameters == 2 * 16 * 16 + 1
    assert facts.subgraph_share > 0.99


def test_old_opset_is_lifted():
    old = convolutional(opset=11)
    new, notes = lift_opset(old, "old.onnx")
    assert facts_of(new).opset == 17
    assert notes == ("operator set 11 converted to 17",)
    assert np.allclose(run_once(new, images())[0], run_once(old, images())[0], atol=1e-6)
    assert lift_opset(convolutional(), "new.onnx") == (convolutional(), ())


def test_traces_of_the_machine_are_removed():
    model = convolutional()
    model.doc_string = model.graph.doc_string = "/home/someone/train.py"
    model.producer_name = "someone"
    entry = model.metadata_props.add()
    entry.key, entry.value = "path", "/home/someone"
    for node in model.graph.node:
        node.doc_string = "/home/someone/model.py"
        prop = node.metadata_props.add()
        prop.key, prop.value = "stack", "/home/someone/model.py"
    assert b"someone" not in encode(normalize(model))


def test_cleaning_folds_batch_norm_and_keeps_the_answers():
    source = normalize(convolutional())
    cleaned, notes = clean(source, images())
    assert "BatchNormalization" not in facts_of(cleaned).operators
    assert any("BatchNormalization" in note for note in notes)
    assert facts_of(cleaned).foreign_domains == ()
    assert [item.domain for item in cleaned.opset_import] == [""]
    assert np.allclose(run_once(cleaned, images(seed=9))[0], run_once(source, images(seed=9))[0], atol=1e-5)


def test_cleaning_gives_the_same_bytes():
    first, second = (encode(clean(normalize(convolutional()), images())[0]) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("keepdims", [0, 1])
def test_mean_over_the_image_becomes_a_pool(keepdims):
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[-1, -2], keepdims=keepdims)
    shape = ["batch", 3] + [1, 1] * keepdims
    model = build([node], [value("x", ["batch", 3, 5, 5])], [value("y", shape)], [])
    feeds = {"x": np.random.default_rng(0).random((2, 3, 5, 5), dtype=np.float32)}
    cleaned, _notes = clean(model, feeds)
    assert "GlobalAveragePool" in facts_of(cleaned).operators
    assert np.allclose(run_once(cleaned, feeds)[0], run_once(model, feeds)[0], atol=1e-6)


def test_mean_over_channels_stays():
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[1, 2], keepdims=1)
    model = build([node], [value("x", ["batch", 3, 5, 5])], [value("y", ["batch", 1, 1, 5])], [])
    cleaned, _notes = clean(model, {"x": np.ones((2, 3, 5, 5), np.float32)})
    assert "GlobalAveragePool" not in facts_of(cleaned).operators


def test_quantized_and_half_precision_models_are_recognized():
    half = convolutional(dtype=np.float16)
    assert facts_of(half).has_float16_weights
    assert not facts_of(convolutional()).has_float16_weights
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    out = helper.make_tensor_value_info("q", onnx.TensorProto.UINT8, ["batch", 4])
    assert facts_of(build([node], [value("x", ["batch", 4])], [out], [])).is_quantized


# --- calibration ------------------------------------------------------------------------------------------------------------


def test_ranges_do_not_depend_on_the_batch_size():
    data = make_dataset(images(50), source="made here")
    for method in ("minmax", "percentile", "mse"):
        small = collect_ranges(convolutional(), data, method=method, batch_size=3)
        large = collect_ranges(convolutional(), data, method=method, batch_size=50)
        for name, ends in small.items():
            assert np.allclose(ends, large[name], rtol=1e-2, atol=1e-4), (method, name)


def test_ranges_hold_the_data_and_zero():
    data = make_dataset(images(20), source="made here")
    ranges = collect_ranges(convolutional(), data)
    assert ranges["x"] == (0.0, float(data.inputs["x"].max()))
    assert all(low <= 0 <= high for low, high in ranges.values())
    assert ranges["logits"][0] < ranges["logits"][1]


def test_outliers_are_clipped():
    arrays = images(400)
    arrays["x"][0, 0, 0, 0] = 1000.0
    data = make_dataset(arrays, source="made here")
    assert collect_ranges(convolutional(), data)["x"][1] == 1000.0
    assert collect_ranges(convolutional(), data, method="percentile")["x"][1] < 2.0
    assert collect_ranges(convolutional(), data, method="mse")["x"][1] <= 1000.0


def test_fixed_batch_is_respected():
    data = make_dataset(images(10), source="made here")
    assert "logits" in collect_ranges(convolutional(batch=4), data)
    with pytest.raises(DataError, match="batches of 16"):
        collect_ranges(convolutional(batch=16), data)


def test_several_inputs():
    random = np.random.default_rng(0)
    arrays = {"left": random.normal(size=(30, 6)).astype(np.float32), "right": random.normal(size=(30, 10)).astype(np.float32)}
    assert {"left", "right", "scores", "hidden"} <= set(collect_ranges(matrix(), make_dataset(arrays, source="made here")))


def test_round_trip_through_a_file(tmp_path):
    path = save(convolutional(), tmp_path / "m.onnx")
    assert facts_of(read_onnx(path)) == facts_of(convolutional())
