"""The contract of every Session, and what is particular to each runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_runtime_models import write_onnx_affine, write_onnx_reshape, write_onnx_strings, write_tflite_add

from edgekit.errors import ArtifactError, DataError, UsageError
from edgekit.runtime.registry import format_of, installed_runtimes, open_session, runtime_of
from edgekit.runtime.session import Session, SessionOptions
from edgekit.schema.tensor import TensorSpec


@pytest.fixture(params=["onnx", "tflite"])
def model_file(request, tmp_path) -> Path:
    if request.param == "onnx":
        return write_onnx_affine(tmp_path / "model.onnx")
    return write_tflite_add(tmp_path / "model.tflite")


def feeds_for(session: Session, batch: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(7)
    return {spec.name: generator.random((batch, *spec.shape[1:]), np.float32) for spec in session.inputs}


def expected_of(session: Session, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return 2 * feeds["x"] + 1 if session.runtime == "onnxruntime" else feeds["left"] + feeds["right"]


# --- every session ----------------------------------------------------------------------------------------------------------


def test_session_keeps_the_protocol(model_file):
    session = open_session(model_file)
    assert isinstance(session, Session)
    assert session.runtime == runtime_of(format_of(model_file))
    assert session.runtime_version == installed_runtimes()[session.runtime]
    assert all(spec.shape == ("batch", 4) for spec in (*session.inputs, *session.outputs))


@pytest.mark.parametrize("batch", [1, 3])
def test_run_any_batch_gives_the_right_numbers(model_file, batch):
    session = open_session(model_file, options=SessionOptions(threads=2))
    feeds = feeds_for(session, batch)
    before = {name: value.copy() for name, value in feeds.items()}
    outputs = session.run(feeds)
    assert list(outputs) == [spec.name for spec in session.outputs]
    (value,) = outputs.values()
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, expected_of(session, feeds), rtol=1e-6)
    for name, array in feeds.items():
        np.testing.assert_array_equal(array, before[name])


def test_run_unoptimized_gives_the_same_numbers(model_file):
    plain = open_session(model_file, options=SessionOptions(is_optimized=False))
    feeds = feeds_for(plain, 2)
    (value,) = plain.run(feeds).values()
    np.testing.assert_allclose(value, expected_of(plain, feeds), rtol=1e-6)


def test_run_array_that_is_not_contiguous(model_file):
    session = open_session(model_file)
    feeds = {name: np.asfortranarray(value) for name, value in feeds_for(session, 3).items()}
    (value,) = session.run(feeds).values()
    np.testing.assert_allclose(value, expected_of(session, feeds), rtol=1e-6)


def test_output_of_one_run_is_not_changed_by_the_next(model_file):
    session = open_session(model_file)
    feeds = feeds_for(session, 1)
    (first,) = session.run(feeds).values()
    kept = first.copy()
    session.run({name: value + 1 for name, value in feeds.items()})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda feeds, name: feeds.pop(name), "data.missing_input"),
        (lambda feeds, name: feeds.update(extra=np.zeros((1, 4), np.float32)), "data.unknown_input"),
        (lambda feeds, name: feeds.update({name: feeds[name].astype(np.float64)}), "data.dtype"),
        (lambda feeds, name: feeds.update({name: feeds[name][:, :3]}), "data.shape"),
        (lambda feeds, name: feeds.update({name: feeds[name][0]}), "data.shape"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(model_file, change, code):
    session = open_session(model_file)
    feeds = feeds_for(session, 2)
    change(feeds, session.inputs[0].name)
    with pytest.raises(DataError) as caught:
        session.run(feeds)
    assert caught.value.code == code
    assert model_file.name in caught.value.message


def test_open_descriptor_without_a_name(model_file):
    file_format = format_of(model_file)
    descriptor = os.open(model_file, os.O_RDONLY)
    try:
        model_file.unlink()
        session = open_session(Path(f"/proc/self/fd/{descriptor}"), format=file_format)
    finally:
        os.close(descriptor)
    feeds = feeds_for(session, 1)
    (value,) = session.run(feeds).values()
    np.testing.assert_allclose(value, expected_of(session, feeds), rtol=1e-6)


@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
@pytest.mark.parametrize("content", [b"", b"not a model " * 50])
def test_file_that_is_no_model(tmp_path, suffix, content, capfd):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        open_session(path)
    assert caught.value.code == "model.unloadable"
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert capfd.readouterr().err == ""


def test_truncated_file(model_file):
    data = model_file.read_bytes()
    model_file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError) as caught:
        open_session(model_file)
    assert caught.value.code == "model.unloadable"


# --- registry ---------------------------------------------------------------------------------------------------------------


def test_unknown_suffix(tmp_path):
    with pytest.raises(UsageError) as caught:
        open_session(tmp_path / "model.pb")
    assert caught.value.code == "model.unknown_format"
    assert ".onnx" in caught.value.hint


def test_missing_file(tmp_path):
    with pytest.raises(UsageError) as caught:
        open_session(tmp_path / "gone.onnx")
    assert caught.value.code == "model.not_found"


@pytest.mark.parametrize(("suffix", "blocked"), [("onnx", ["onnxruntime"]), ("tflite", ["ai_edge_litert", "tflite_runtime"])])
def test_runtime_that_is_not_installed(tmp_path, suffix, blocked):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(b"any")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # what an import sees where the package is not installed
from pathlib import Path
from edgekit.errors import EnvironmentFault
from edgekit.runtime.registry import open_session
try:
    open_session(Path({str(path)!r}))
except EnvironmentFault as error:
    print(error.code, "|", error.hint)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("runtime.missing | pip install 'edgekit[")


def test_registry_loads_no_runtime_and_no_framework():
    code = """
import sys
from edgekit.runtime.registry import installed_runtimes
assert installed_runtimes()
heavy = {"onnxruntime", "ai_edge_litert", "tflite_runtime", "torch", "onnx"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------------


def test_ort_failure_in_a_run_is_wrapped_and_silent(tmp_path, capfd):
    session = open_session(write_onnx_reshape(tmp_path / "reshape.onnx"))
    with pytest.raises(ArtifactError) as caught:
        session.run({"x": np.zeros((2, 4), np.float32), "shape": np.array([3, 3])})
    assert caught.value.code == "model.run_failed"
    assert "reshape.onnx" in caught.value.message
    assert capfd.readouterr().err == ""


def test_ort_axes_without_a_name_get_one(tmp_path):
    session = open_session(write_onnx_reshape(tmp_path / "reshape.onnx"))
    assert session.outputs[0].shape == ("axis0", "axis1")


def test_ort_text_tensors_are_refused(tmp_path):
    with pytest.raises(ArtifactError) as caught:
        open_session(write_onnx_strings(tmp_path / "strings.onnx"))
    assert caught.value.code == "model.unsupported_type"


def test_ort_fixed_batch_is_kept(tmp_path):
    session = open_session(write_onnx_affine(tmp_path / "fixed.onnx", batch=2))
    assert session.inputs[0].shape == (2, 4)
    with pytest.raises(DataError):
        session.run({"x": np.zeros((1, 4), np.float32)})


def test_ort_sample_model_is_as_accurate_as_its_card_says(sample_dir):
    session = open_session(sample_dir / "model.onnx")
    data = np.load(sample_dir / "evaluation.npz")
    (logits,) = session.run({"image": data["image"][:500]}).values()
    assert np.mean(logits.argmax(axis=1) == data["labels"][:500]) > 0.88


# --- LiteRT -----------------------------------------------------------------------------------------------------------------


def test_litert_names_come_from_the_signature(tmp_path):
    session = open_session(write_tflite_add(tmp_path / "named.tflite"))
    assert [spec.name for spec in (*session.inputs, *session.outputs)] == ["left", "right", "sum"]


def test_litert_tensor_names_where_there_is_no_signature(tmp_path):
    session = open_session(write_tflite_add(tmp_path / "plain.tflite", has_signature=False))
    assert [spec.name for spec in session.inputs] == ["serving_default_args_0:0", "serving_default_args_1:0"]


def test_litert_integer_tensors_are_declared_as_they_are(tmp_path):
    session = open_session(write_tflite_add(tmp_path / "int8.tflite", dtype="int8"))
    assert session.inputs[0] == TensorSpec(name="left", dtype="int8", shape=("batch", 4))
    left, right = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int8), np.array([[10, 20, 30, 40], [-5, -6, -7, -8]], np.int8)
    (value,) = session.run({"left": left, "right": right}).values()
    assert value.dtype == np.int8
    np.testing.assert_array_equal(value, left + right)


def test_litert_fixed_batch_is_kept(tmp_path):
    session = open_session(write_tflite_add(tmp_path / "two.tflite", shapes=((2, 4), (2, 4))))
    assert session.inputs[0].shape == (2, 4)
    feeds = {"left": np.ones((2, 4), np.float32), "right": np.ones((2, 4), np.float32)}
    np.testing.assert_array_equal(session.run(feeds)["sum"], np.full((2, 4), 2, np.float32))


def test_litert_inputs_without_a_common_batch_are_not_looped(tmp_path):
    session = open_session(write_tflite_add(tmp_path / "mixed.tflite", shapes=((1, 4), (3, 4))))
    assert [spec.shape for spec in session.inputs] == [(1, 4), (3, 4)]
    feeds = {"left": np.ones((1, 4), np.float32), "right": np.ones((3, 4), np.float32)}
    assert session.run(feeds)["sum"].shape == (3, 4)


@pytest.mark.parametrize("lengths", [(2, 3), (0, 0)])
def test_litert_uneven_or_empty_batches_are_refused(tmp_path, lengths):
    session = open_session(write_tflite_add(tmp_path / "model.tflite"))
    with pytest.raises(DataError) as caught:
        session.run({name: np.zeros((n, 4), np.float32) for name, n in zip(("left", "right"), lengths, strict=True)})
    assert caught.value.code == "data.shape"
