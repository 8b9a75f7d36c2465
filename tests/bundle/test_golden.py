from __future__ import annotations

import json
import shutil

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from releases import BORN, CONTRACT, candidate_folder

from edgekit.bundle.golden import array_of, run_golden, tensor_data
from edgekit.bundle.reader import verify_bundle
from edgekit.bundle.sampling import MARGIN, derive_tolerance, make_golden
from edgekit.bundle.writer import pack_bundle
from edgekit.errors import ArtifactError, DataError, UsageError
from edgekit.schema.base import decode_msgpack
from edgekit.schema.manifest import GoldenSample, GoldenSet
from edgekit.schema.tensor import TensorData
from edgekit.target.load import load_target
from edgekit.trust.signer import generate_signer


class Answers:
    """A session whose answers are a function of its feeds."""

    runtime, runtime_version = "onnxruntime", "1.32.0"

    def __init__(self, function):
        self._function = function
        self.is_closed = False

    def run(self, feeds):
        return {"y": self._function(feeds["x"])}

    def close(self):
        self.is_closed = True


def golden_set(expected, *, atol=0.1, rtol=0.0, is_top1_checked=False) -> GoldenSet:
    x = np.zeros((1, 4), np.float32)
    sample = GoldenSample(inputs={"x": tensor_data(x)}, outputs={"y": tensor_data(np.asarray(expected, np.float32))})
    return GoldenSet(samples=(sample,), atol=atol, rtol=rtol, is_top1_checked=is_top1_checked)


def verdict(actual, golden):
    return run_golden(Answers(lambda x: np.asarray(actual, np.float32)), golden)


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.int8, np.uint8, np.int64, np.bool_, np.dtype(">f4")]),
        hnp.array_shapes(min_dims=0, min_side=0),
    )
)
def test_tensor_round_trip(array):
    again = array_of(tensor_data(array))
    assert again.shape == array.shape
    np.testing.assert_array_equal(again, array)


def test_tensor_with_too_few_bytes():
    with pytest.raises(ArtifactError) as caught:
        array_of(TensorData(dtype="float32", shape=(2, 2), data=b"1234"))
    assert caught.value.code == "golden.malformed"


@pytest.mark.parametrize(
    ("actual", "is_passed", "words"),
    [
        ([[1.0, 2.0, 3.0]], True, "1 of 1"),
        ([[1.09, 2.0, 3.0]], True, "90%"),
        ([[1.11, 2.0, 3.0]], False, "y[0, 0] is 1.11, expected 1 ± 0.1"),
        ([[np.nan, 2.0, 3.0]], False, "not finite"),
        ([[1.0, 2.0]], False, "shape"),
        ([[1.0, 2.0, np.inf]], False, "not finite"),
    ],
)
def test_golden_compares_with_tolerance(actual, is_passed, words):
    result = verdict(actual, golden_set([[1.0, 2.0, 3.0]]))
    assert result.is_passed is is_passed
    assert words.replace("%", " %").replace(" %", "%") in result.reason
    assert len(result.latencies_ms) == 1


def test_golden_relative_tolerance():
    golden = golden_set([[100.0, 0.0]], atol=0.0, rtol=0.01)
    assert verdict([[100.9, 0.0]], golden).is_passed
    assert not verdict([[100.9, 1e-6]], golden).is_passed


def test_golden_other_class_is_named():
    golden = golden_set([[1.0, 5.0, 0.0]], atol=0.5, is_top1_checked=True)
    result = verdict([[6.0, 5.0, 0.0]], golden)
    assert not result.is_passed
    assert "says class 0, expected 1" in result.reason


def test_golden_near_tie_may_change_class():
    golden = golden_set([[1.0, 1.05, 0.0]], atol=0.1, is_top1_checked=True)
    assert verdict([[1.06, 1.0, 0.0]], golden).is_passed


def test_golden_missing_output_and_failing_runtime():
    golden = golden_set([[1.0]])

    class Other(Answers):
        def run(self, feeds):
            return {"z": np.zeros(1)}

    class Broken(Answers):
        def run(self, feeds):
            raise ArtifactError("model.run_failed", "it exploded")

    assert "no output y" in run_golden(Other(None), golden).reason
    assert "it exploded" in run_golden(Broken(None), golden).reason


def test_golden_set_without_samples_cannot_pass():
    with pytest.raises(ArtifactError) as caught:
        verdict([[1.0]], GoldenSet(samples=(), atol=1.0, rtol=0.0))
    assert caught.value.code == "golden.empty"


@given(st.floats(0, 1), st.floats(0.001, 0.1))
def test_golden_verdict_is_the_documented_rule(shift, atol):
    expected = np.float32([[1.0, 2.0]])
    actual = expected + np.float32(shift)
    error = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()
    assert verdict(actual, golden_set(expected, atol=atol)).is_passed == bool(error <= atol)


class Samples:
    def __init__(self, **inputs):
        self.inputs = inputs

    def __len__(self):
        return len(next(iter(self.inputs.values())))


WEIGHTS = np.random.default_rng(3).normal(size=(4, 3)).astype(np.float32)
DATA = Samples(x=np.random.default_rng(4).uniform(-1, 1, (60, 4)).astype(np.float32))


def opener(noise=0.0, opened=None):
    def open_model(*, threads, is_optimized):
        shift = noise if not is_optimized else 0.0
        session = Answers(lambda x: x @ WEIGHTS + np.float32(shift))
        if opened is not None:
            opened.append((threads, is_optimized, session))
        return session

    return open_model


def made(noise=0.0, **changes):
    opened = changes.pop("opened", None)
    arguments = {"samples": DATA, "precision": "fp32", "count": 6, "threads": 2, "seed": 0} | changes
    return make_golden(opener(noise, opened), CONTRACT, **arguments).golden


def test_golden_samples_are_spread_over_predicted_classes():
    classes = [int(array_of(s.outputs["y"]).argmax()) for s in made().samples]
    assert sorted(set(classes)) == [0, 1, 2]
    assert max(classes.count(c) for c in classes) == 2
    raw = {array_of(s.inputs["x"]).tobytes() for s in made().samples}
    assert raw <= {row.tobytes() for row in DATA.inputs["x"]}


def test_tolerance_takes_the_measured_deviation_with_margin():
    golden = made(noise=0.01)
    assert golden.atol == pytest.approx(0.01 * MARGIN, rel=1e-3)
    assert "0.01 was measured here" in golden.tolerance_reason
    assert golden.is_top1_checked


def test_tolerance_floor_allows_int8_some_steps():
    outputs = [{"y": np.float32([[-1.0, 4.1]])}]
    atol, rtol, reason = derive_tolerance(outputs, 0.0, precision="int8", conditions="test")
    assert atol == pytest.approx(8 * 5.1 / 255, rel=1e-5)
    assert rtol == 0.0
    assert "8 steps" in reason
    fp32 = derive_tolerance(outputs, 0.0, precision="fp32", conditions="test")[0]
    assert fp32 == pytest.approx(5.1e-4, rel=1e-5)


def test_model_whose_answers_cannot_be_tested():
    with pytest.raises(ArtifactError) as caught:
        made(noise=5.0)
    assert caught.value.code == "golden.unstable"


def test_golden_without_data_is_drawn_within_the_contract():
    golden = made(samples=None)
    values = np.concatenate([array_of(s.inputs["x"]).ravel() for s in golden.samples])
    assert -1 <= values.min() < values.max() <= 1
    assert "no data was given" in golden.tolerance_reason
    assert golden == made(samples=None)


def test_golden_closes_every_session():
    opened = []
    made(opened=opened)
    assert [(t, o) for t, o, _ in opened] == [(1, True), (1, False), (2, True)]
    assert all(session.is_closed for *_, session in opened)


@pytest.mark.parametrize(
    ("samples", "code"), [(Samples(z=np.zeros((3, 4))), "data.missing_input"), (Samples(x=np.zeros((0, 4))), "data.empty")]
)
def test_golden_with_data_that_does_not_fit(samples, code):
    with pytest.raises(DataError) as caught:
        made(samples=samples)
    assert caught.value.code == code


def open_onnx(path, *, threads, is_optimized):
    from edgekit.runtime.registry import open_session
    from edgekit.runtime.session import SessionOptions

    return open_session(path, options=SessionOptions(threads=threads, is_optimized=is_optimized))


def pack(folder, out, signer, **changes):
    arguments = {"name": "kws", "version": "1.0.0", "signer": signer, "open_session": open_onnx, "created_at": BORN} | changes
    return pack_bundle(folder, out, **arguments)


@pytest.fixture(scope="module")
def signer():
    return generate_signer()


def test_pack_real_model_and_test_it_again(tmp_path, signer):
    folder = candidate_folder(tmp_path / "out")
    profile = load_target("x86-64-avx2")
    path = pack(folder, tmp_path / "a.edgekit", signer, data=DATA, profile=profile)
    found = verify_bundle(path, [signer.public_key])
    variant = found.manifest.variants[0]
    assert [ref.path for ref in found.manifest.blobs] == [
        "model.onnx", "golden.msgpack", "candidate.json", "report.html", "report.json"
    ]  # fmt: skip
    assert variant.requires.runtime == "onnxruntime"
    assert variant.requires.runtime_version.count(".") == 1
    assert variant.requires.arch == ()  # float32 runs everywhere
    golden = decode_msgpack(found.blob(variant.golden), GoldenSet)
    result = run_golden(open_onnx(folder / "model.onnx", threads=1, is_optimized=True), golden)
    assert result.is_passed, result.reason
    other = candidate_folder(tmp_path / "other", seed=1)
    wrong = run_golden(open_onnx(other / "model.onnx", threads=1, is_optimized=True), golden)
    assert not wrong.is_passed
    assert pack(folder, tmp_path / "b.edgekit", signer, data=DATA, profile=profile).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"name": "Bad Name"}, "bundle.name"),
        ({"name": ""}, "bundle.name"),
        ({"name": "a/b"}, "bundle.name"),
        ({"name": "kws\n"}, "bundle.name"),
        ({"version": "1 0"}, "bundle.version"),
        ({"version": "../1"}, "bundle.version"),
        ({"golden_samples": 0}, "bundle.golden_samples"),
    ],
)
def test_pack_with_bad_arguments(tmp_path, signer, change, code):
    with pytest.raises(UsageError) as caught:
        pack(candidate_folder(tmp_path / "out"), tmp_path / "a.edgekit", signer, **change)
    assert caught.value.code == code


def test_pack_model_changed_after_evaluation(tmp_path, signer):
    folder = candidate_folder(tmp_path / "out")
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError) as caught:
        pack(folder, tmp_path / "a.edgekit", signer)
    assert caught.value.code == "candidate.digest_mismatch"
    assert not (tmp_path / "a.edgekit").exists()


def test_pack_folder_without_candidate(tmp_path, signer):
    with pytest.raises(UsageError) as caught:
        pack(tmp_path, tmp_path / "a.edgekit", signer)
    assert caught.value.code == "candidate.not_found"


def test_pack_candidate_that_names_a_model_elsewhere(tmp_path, signer):
    folder = candidate_folder(tmp_path / "out")
    shutil.copy(folder / "model.onnx", tmp_path / "model.onnx")
    record = json.loads((folder / "candidate.json").read_bytes())
    record["artifact"]["path"] = "../model.onnx"
    (folder / "candidate.json").write_bytes(msgspec.json.encode(record))
    with pytest.raises(ArtifactError) as caught:
        pack(folder, tmp_path / "a.edgekit", signer)
    assert caught.value.code == "candidate.outside"


def test_pack_failed_candidate(tmp_path, signer):
    folder = candidate_folder(tmp_path / "out")
    record = json.loads((folder / "candidate.json").read_bytes())
    record["verdict"]["status"] = "failed"
    (folder / "candidate.json").write_bytes(msgspec.json.encode(record))
    with pytest.raises(ArtifactError) as caught:
        pack(folder, tmp_path / "a.edgekit", signer)
    assert caught.value.code == "candidate.failed"


@pytest.mark.parametrize("tolerance", [{"atol": float("nan")}, {"atol": float("inf")}, {"rtol": float("nan")}, {"atol": -1.0}])
def test_tolerance_that_tests_nothing_refused(tolerance):
    with pytest.raises(ArtifactError) as caught:
        run_golden(Answers(lambda _: np.full((1, 3), 9.0, np.float32)), golden_set([[1.0, 2.0, 3.0]], **tolerance))
    assert caught.value.code == "golden.malformed"


def test_sample_that_expects_nothing_refused():
    golden = golden_set([[1.0]])
    blank = msgspec.structs.replace(golden.samples[0], outputs={})
    with pytest.raises(ArtifactError) as caught:
        run_golden(Answers(lambda _: np.ones((1, 1))), msgspec.structs.replace(golden, samples=(*golden.samples, blank)))
    assert caught.value.code == "golden.malformed"


def test_expected_value_that_is_not_finite_matches_nothing():
    assert not run_golden(Answers(lambda _: np.ones((1, 2), np.float32)), golden_set([[1.0, float("nan")]])).is_passed
