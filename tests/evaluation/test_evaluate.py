"""Prediction in batches, and the paired comparison with the baseline."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.dataset.data import make_dataset
from edgekit.dataset.load import load_dataset
from edgekit.errors import ArtifactError, DataError
from edgekit.evaluation.evaluate import evaluate, predict, resample_means
from edgekit.evaluation.metric import resolve_metric
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.measurement import EvalReport
from edgekit.schema.tensor import TensorSpec

TOP1 = resolve_metric("top1", has_labels=True, task="classification")


class Doubler:
    """A session of arithmetic: y = 2 x, with a fixed or a dynamic batch; keeps the batch sizes that it saw."""

    runtime, runtime_version = "numpy", np.__version__

    def __init__(self, batch="batch", name="x"):
        self.inputs = (TensorSpec(name=name, dtype="float32", shape=(batch, 2)),)
        self.outputs = (TensorSpec(name="y", dtype="float32", shape=(batch, 2)),)
        self.seen = []

    def run(self, feeds):
        array = feeds[self.inputs[0].name]
        self.seen.append(len(array))
        return {"y": array * 2}

    def close(self):
        pass


def samples(count, name="x"):
    return make_dataset({name: np.arange(count * 2, dtype=np.float32).reshape(count, 2)}, source="test")


@given(st.integers(1, 30), st.integers(1, 40), st.sampled_from(["batch", 1, 4]))
def test_predict_answers_every_sample_in_order(count, size, batch):
    session, data, shown = Doubler(batch), samples(count), []
    outputs = predict(session, data, size, on_progress=lambda _text, done: shown.append(done))
    np.testing.assert_array_equal(outputs["y"], data.inputs["x"] * 2)
    assert set(session.seen) == {batch} if batch != "batch" else max(session.seen) <= size
    assert shown == sorted(shown)
    assert shown[-1] == 1.0


def test_predict_matches_a_renamed_single_input():
    np.testing.assert_array_equal(predict(Doubler(name="args_0"), samples(3))["y"][2], [8, 10])


def test_predict_refuses_other_names():
    data = make_dataset({"a": np.zeros((1, 2), np.float32), "b": np.zeros((1, 2), np.float32)}, source="test")
    with pytest.raises(DataError) as caught:
        predict(Doubler(), data)
    assert caught.value.code == "data.missing_input"


def test_predict_refuses_outputs_without_samples(monkeypatch):
    monkeypatch.setattr(Doubler, "run", lambda self, feeds: {"y": np.float32(feeds["x"].sum()).reshape(1)})
    with pytest.raises(ArtifactError) as caught:
        predict(Doubler(), samples(3))
    assert caught.value.code == "model.no_batch_axis"


# --- evaluate ---------------------------------------------------------------------------------------------------------------


def scores_for(hits, labels, classes=4):
    """Scores whose winner is the label where ``hits``, else the next class."""
    winners = np.where(hits, labels, (labels + 1) % classes)
    return {"logits": np.eye(classes, dtype=np.float32)[winners]}


def labelled(labels, class_names=()):
    return make_dataset({"x": np.zeros((len(labels), 1), np.float32)}, labels=labels, class_names=class_names, source="test")


def test_report_of_a_classifier():
    labels = np.repeat(np.arange(4), 25)
    base = np.ones(100, bool)
    base[:10] = False
    own = base.copy()
    own[50:55] = False
    data = labelled(labels, ("a", "b", "c", "d"))
    report = evaluate(scores_for(own, labels), scores_for(base, labels), data, TOP1, isa=["avx2"])
    assert (report.metric, report.value, report.baseline) == ("top1", 0.85, 0.9)
    assert report.drop == pytest.approx(0.05)
    assert report.drop_low < 0.05 < report.drop_high
    assert report.extra["agreement"] == pytest.approx(0.95)
    assert report.extra["balanced_accuracy"] == pytest.approx(0.85)
    assert report.extra["sqnr_db"] == pytest.approx(10 * np.log10(100 / 10))
    assert report.per_class == pytest.approx({"a": 0.6, "b": 1.0, "c": 0.8, "d": 1.0})
    assert (report.samples, report.data, report.isa) == (100, data.digest, ("avx2",))
    assert decode_json(encode_json(report), EvalReport) == report


def test_identical_models_drop_nothing_and_encode():
    labels = np.arange(40) % 4
    same = scores_for(np.ones(40, bool), labels)
    report = evaluate(same, same, labelled(labels), TOP1, isa=[])
    assert (report.drop, report.drop_low, report.drop_high) == (0, 0, 0)
    assert report.extra["sqnr_db"] == 200.0
    assert decode_json(encode_json(report), EvalReport) == report


def test_positive_drop_is_worse_for_errors_too():
    labels = np.linspace(0, 1, 30)
    base = {"y": labels[:, None].astype(np.float32)}
    own = {"out": (labels[:, None] + np.linspace(0.1, 0.3, 30)[:, None]).astype(np.float32)}
    for name in ("mse", "mae", "rmse"):
        metric = resolve_metric(name, has_labels=True, task="other")
        report = evaluate(own, base, labelled(labels), metric, isa=[])
        assert not report.is_higher_better
        assert 0 < report.drop_low < report.drop < report.drop_high
        assert report.drop == pytest.approx(report.value - report.baseline)
        assert "agreement" not in report.extra
        assert report.per_class == {}


def test_whole_metric_has_no_interval():
    labels = np.arange(40) % 4
    hits = np.arange(40) > 5
    metric = resolve_metric("balanced_accuracy", has_labels=True, task="classification")
    report = evaluate(scores_for(hits, labels), scores_for(~hits, labels), labelled(labels), metric, isa=[])
    assert (report.drop_low, report.drop_high) == (None, None)
    assert report.extra["top1"] == pytest.approx(34 / 40)


def test_unlabelled_classifier_is_compared_with_the_baseline():
    labels = np.arange(40) % 4
    data = make_dataset({"x": np.zeros((40, 1), np.float32)}, source="test")
    metric = resolve_metric(None, has_labels=False, task="classification")
    base, own = scores_for(np.ones(40, bool), labels), scores_for(np.arange(40) >= 4, labels)
    report = evaluate(own, base, data, metric, isa=[])
    assert (report.metric, report.value, report.baseline) == ("agreement", 0.9, 1.0)
    assert report.drop_low < 0.1 < report.drop_high


@pytest.mark.parametrize(
    ("own", "code"),
    [
        ({"y": np.zeros((3, 2))}, "model.outputs_differ"),
        ({"y": np.zeros((2, 3))}, "model.outputs_differ"),
        ({"y": np.zeros((2, 2)), "z": np.zeros((2, 2))}, "model.outputs_differ"),
        ({"y": np.array([[0, 1], [np.nan, 0]])}, "model.not_finite"),
        ({"y": np.array([[0, 1], [np.inf, 0]])}, "model.not_finite"),
    ],
)
def test_bad_outputs(own, code):
    with pytest.raises(ArtifactError) as caught:
        evaluate(own, {"y": np.ones((2, 2))}, labelled(np.array([0, 1])), TOP1, isa=[])
    assert caught.value.code == code
    if code == "model.not_finite":
        assert "sample 1" in caught.value.message


def test_bad_baseline_is_named():
    with pytest.raises(ArtifactError, match="baseline"):
        evaluate({"y": np.ones((2, 2))}, {"y": np.full((2, 2), np.nan)}, labelled(np.array([0, 1])), TOP1, isa=[])


# --- bootstrap --------------------------------------------------------------------------------------------------------------


def test_interval_covers_the_true_drop_as_often_as_it_says():
    """200 draws from known pair probabilities: 95 % coverage is 190 of 200, 3 standard errors below is 180."""
    random = np.random.default_rng(11)
    pairs = np.array([[1, 1], [0, 1], [1, 0], [0, 0]], float)
    chances = np.array([0.80, 0.08, 0.03, 0.09])
    truth, covered = 0.05, 0
    for trial in range(200):
        drawn = pairs[random.choice(4, size=400, p=chances)]
        means = resample_means(drawn, seed=trial)
        low, high = np.quantile(means[:, 1] - means[:, 0], [0.025, 0.975])
        covered += low <= truth <= high
    assert 180 <= covered <= 200


def test_pairing_narrows_the_interval():
    """The same samples are hard for both: unpaired, the interval would be as wide as both accuracies' own."""
    labels = np.zeros(1000, int)
    base = np.random.default_rng(0).random(1000) < 0.7
    own = base.copy()
    own[:10] = False
    report = evaluate(scores_for(own, labels), scores_for(base, labels), labelled(labels), TOP1, isa=[])
    unpaired = 2 * 1.96 * np.sqrt(2 * 0.7 * 0.3 / 1000)
    assert report.drop_high - report.drop_low < unpaired / 4


def test_both_ways_of_resampling_agree():
    """Index draws and multinomial draws of the same scores have the same mean and spread (tolerance 6 standard errors)."""
    random = np.random.default_rng(5)
    coarse = random.integers(0, 2, (500, 2)).astype(float)
    fine = coarse + random.normal(0, 1e-9, coarse.shape)
    drawn, indexed = resample_means(coarse, seed=1), resample_means(fine, seed=2)
    spread = coarse.std(axis=0) / np.sqrt(500)
    np.testing.assert_allclose(drawn.mean(axis=0), indexed.mean(axis=0), atol=6 * spread.max() / np.sqrt(1000))
    np.testing.assert_allclose(drawn.std(axis=0), indexed.std(axis=0), rtol=0.15)
    np.testing.assert_allclose(indexed.std(axis=0), spread, rtol=0.15)


def test_resampling_is_the_same_for_a_seed_whatever_the_chunk(monkeypatch):
    pairs = np.random.default_rng(5).normal(size=(300, 2))
    whole = resample_means(pairs, seed=9, resamples=50)
    np.testing.assert_array_equal(whole, resample_means(pairs, seed=9, resamples=50))
    monkeypatch.setattr("edgekit.evaluation.evaluate._CHUNK_VALUES", 300 * 2 * 7)
    np.testing.assert_array_equal(whole, resample_means(pairs, seed=9, resamples=50))
    assert not np.array_equal(whole, resample_means(pairs, seed=10, resamples=50))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_interval_stays_within_what_was_seen(hits):
    own, base = (np.array(column) for column in zip(*hits, strict=True))
    labels = np.zeros(len(hits), int)
    report = evaluate(scores_for(own, labels), scores_for(base, labels), labelled(labels), TOP1, isa=[])
    assert -1 <= report.drop_low <= report.drop_high <= 1
    assert report.drop == pytest.approx(base.mean() - own.mean())


def test_sample_model_on_the_runtime(sample_dir):
    from edgekit.runtime.registry import open_session

    session = open_session(sample_dir / "model.onnx")
    data = load_dataset(str(sample_dir / "evaluation.npz"), session.inputs, limit=500)
    outputs = predict(session, data)
    report = evaluate(outputs, outputs, data, TOP1, isa=[])
    assert report.value > 0.85
    assert len(report.per_class) == 10
    assert report.drop == 0


# --- rare differences --------------------------------------------------------------------------------------------------------


def agreement_of(missed: int, count: int):
    """Agreement with fp32 where so many of the samples are answered differently."""
    labels = np.arange(count) % 4
    own = scores_for(np.arange(count) >= missed, labels)
    data = make_dataset({"x": np.zeros((count, 1), np.float32)}, source="made here")
    metric = resolve_metric("agreement", has_labels=False, task="classification")
    return evaluate(own, scores_for(np.ones(count, bool), labels), data, metric, isa=[])


@pytest.mark.parametrize(("missed", "low", "high"), [(1, 0.0004, 0.0155), (3, 0.0028, 0.0264), (150, 0.4437, 0.5563)])
def test_interval_of_a_share_is_that_of_jeffreys(missed, low, high):
    """Reference values: quantiles of Beta(missed + 1/2, 300 - missed + 1/2)."""
    report = agreement_of(missed, 300)
    assert report.drop == pytest.approx(missed / 300)
    assert (report.drop_low, report.drop_high) == (pytest.approx(low, abs=3e-4), pytest.approx(high, abs=5e-4))


def test_no_difference_has_no_width():
    report = agreement_of(0, 300)
    assert (report.drop_low, report.drop_high) == (0.0, 0.0)
