"""Labels that come later, and inputs that may leave: counted once, redacted, and never beyond the quota."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgekit.agent.config import AgentConfig, SamplesConfig, check_config
from edgekit.agent.feedback import MAX_AGE_S, MAX_REMEMBERED, Feedback, unpack_tensor
from edgekit.agent.link import Labelled, Model, Sampled, TakeSample
from edgekit.agent.meter import Meter
from edgekit.agent.redaction import parse_rules, redact
from edgekit.agent.samples import FILE, SampleDesk
from edgekit.errors import DataError, UsageError
from edgekit.telemetry.codec import MAX_BYTES, encode
from tests.agent.world import build_manifest

RNG = np.random.default_rng(0)
X = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)
SURE_B = np.array([[0.1, 5.0, 0.2]], np.float32)


@pytest.fixture
def made():
    manifest = build_manifest()
    now = [0.0]
    sent = []
    meter = Meter(model_digest=manifest.variants[0].model)
    model = Model(manifest=manifest, variant=manifest.variants[0], blob_dir="/nowhere")
    return Feedback(model=model, meter=meter, send=sent.append, now_s=lambda: now[0]), meter, sent, now


def label(feedback, prediction_id, value):
    return feedback.take(json.dumps({"prediction_id": prediction_id, "label": value}).encode())


def test_label_in_time_is_counted_and_does_not_travel(made):
    feedback, meter, sent, _ = made
    for number in range(3):
        feedback.note(f"p{number}", {"x": X}, {"y": SURE_B})
    assert label(feedback, "p0", "b") == {"counted": 1, "forwarded": 0}
    assert label(feedback, "p1", 1) == {"counted": 1, "forwarded": 0}
    assert label(feedback, "p2", "c") == {"counted": 1, "forwarded": 0}
    figures = meter.take()
    assert (figures.labelled, figures.right) == (3, 2)
    assert sent == []
    assert (meter.take().labelled, meter.take().right) == (0, 0)


def test_label_too_old_unknown_or_second_travels_and_is_not_counted(made):
    feedback, meter, sent, now = made
    feedback.note("old", {"x": X}, {"y": SURE_B})
    now[0] = MAX_AGE_S + 1
    feedback.note("new", {"x": X}, {"y": SURE_B})
    label(feedback, "new", "b")
    for prediction_id in ("old", "never", "new"):
        assert label(feedback, prediction_id, "c") == {"counted": 0, "forwarded": 1}
    assert [(frame.prediction_id, frame.label, frame.predicted, frame.is_counted) for frame in sent] == [
        ("old", "c", "", False),
        ("never", "c", "", False),
        ("new", "c", "b", False),
    ]
    assert meter.take().labelled == 1


def test_memory_of_predictions_is_bounded(made):
    feedback, _, sent, _ = made
    for number in range(MAX_REMEMBERED + 10):
        feedback.note(str(number), {"x": X}, {"y": SURE_B})
    assert len(feedback._known) == MAX_REMEMBERED
    assert label(feedback, "5", "b")["forwarded"] == 1
    assert label(feedback, str(MAX_REMEMBERED), "b")["counted"] == 1
    assert len(sent) == 1


def test_prediction_of_several_samples_takes_a_list(made):
    feedback, meter, sent, _ = made
    feedback.note("p", {"x": np.repeat(X, 2, 0)}, {"y": np.array([[9.0, 0, 0], [0, 9, 0]], np.float32)})
    assert label(feedback, "p", ["a", "a"])["counted"] == 1
    figures = meter.take()
    assert (figures.labelled, figures.right) == (2, 1)
    feedback.note("q", {"x": np.repeat(X, 2, 0)}, {"y": np.array([[9.0, 0, 0], [0, 9, 0]], np.float32)})
    assert label(feedback, "q", "a")["forwarded"] == 1
    assert sent[0].predicted == "a,b"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"label": "b"}', b'{"prediction_id": "p", "label": 1.5}'])
def test_labels_without_sense_are_refused(made, body):
    with pytest.raises(DataError, match=r"label|prediction_id"):
        made[0].take(body)


@pytest.mark.parametrize("value", ["dog", 3, -1])
def test_unknown_class_is_refused_and_nothing_is_taken(made, value):
    feedback, meter, _, _ = made
    feedback.note("p", {"x": X}, {"y": SURE_B})
    body = {"labels": [{"prediction_id": "p", "label": "b"}, {"prediction_id": "p", "label": value}]}
    with pytest.raises(DataError, match="a, b, c"):
        feedback.take(json.dumps(body).encode())
    assert meter.take().labelled == 0


def test_confidence_of_logits_and_probabilities(made):
    feedback, _, sent, _ = made
    logits = np.array([[1.0, 2.0, 0.5]], np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    for name, scores in (("l", logits), ("p", probabilities)):
        feedback.wanted = TakeSample(model="m", redact=("none",), max_bytes=10_000)
        feedback.note(name, {"x": X}, {"y": scores})
    assert [frame.confidence for frame in sent] == pytest.approx([float(probabilities.max())] * 2, rel=1e-5)


# --- samples


def test_sample_is_redacted_and_its_label_travels_too(made):
    feedback, meter, sent, _ = made
    feedback.wanted = TakeSample(model="m", redact=("drop:x.1",), max_bytes=10_000)
    feedback.note("p", {"x": X}, {"y": SURE_B})
    feedback.note("q", {"x": X}, {"y": SURE_B})
    (sample,) = sent
    assert isinstance(sample, Sampled)
    array = unpack_tensor(sample.tensors[0])
    assert np.isnan(array[0, 1])
    assert array[0, 0] == X[0, 0]
    assert not np.isnan(X).any(), "the model's own input is untouched"
    assert (sample.prediction_id, sample.predicted, sample.redacted) == ("p", "b", ("drop:x.1",))
    assert label(feedback, "p", "b") == {"counted": 1, "forwarded": 0}
    assert isinstance(sent[1], Labelled)
    assert sent[1].is_counted
    assert meter.take().labelled == 1


def test_rare_answer_is_not_given(made):
    feedback, _, sent, _ = made
    feedback.wanted = TakeSample(model="m", redact=("none",), max_bytes=10_000, k_min=5)
    for number in range(4):
        feedback.note(str(number), {"x": X}, {"y": SURE_B})
    feedback.note("odd", {"x": X}, {"y": np.array([[9.0, 0, 0]], np.float32)})
    assert sent == []
    feedback.note("fifth", {"x": X}, {"y": SURE_B})
    assert [frame.prediction_id for frame in sent] == ["fifth"]


@pytest.mark.parametrize("rules", [("drop:other",), ("drop:x.9",), ("drop:x.name",), ("blur:x:2",), ("drop:x",)])
def test_rule_that_cannot_be_followed_keeps_everything_here(made, rules):
    feedback, _, sent, _ = made
    feedback.wanted = TakeSample(model="m", redact=rules, max_bytes=10_000)
    feedback.note("p", {"x": X}, {"y": SURE_B})
    assert sent == []
    assert feedback.wanted is None


def test_sample_above_its_size_stays(made):
    feedback, _, sent, _ = made
    feedback.wanted = TakeSample(model="m", redact=("none",), max_bytes=5)
    feedback.note("p", {"x": X}, {"y": SURE_B})
    assert sent == []


@pytest.mark.parametrize("shape", [(1, 3, 8, 12), (1, 8, 12, 1)])
def test_images_are_blurred_and_made_small(shape):
    image = RNG.integers(0, 255, shape).astype(np.uint8)
    (small,) = redact(parse_rules(("downscale:i:4",)), {"i": image}, {}).values()
    rows, across = (2, 3) if shape[1] == 3 else (1, 2)
    assert (small.shape[rows], small.shape[across]) == (2, 3)
    block = image[0, 0, :4, :4] if shape[1] == 3 else image[0, :4, :4, 0]
    assert small.ravel()[0] == int(block.mean())
    (blurred,) = redact(parse_rules(("blur:i:1",)), {"i": image}, {}).values()
    assert blurred.shape == image.shape
    middle = image[0, 0, 3:6, 4:7] if shape[1] == 3 else image[0, 3:6, 4:7, 0]
    found = blurred[0, 0, 4, 5] if shape[1] == 3 else blurred[0, 4, 5, 0]
    assert abs(int(found) - middle.mean()) <= 1
    assert redact(parse_rules(("none",)), {"i": image}, {})["i"] is image


@pytest.mark.parametrize("text", ["", "blur", "blur:x", "blur:x:0", "drop:", "hide:x", "none:x", "downscale:x:-1"])
def test_text_that_is_no_rule_is_refused(text):
    with pytest.raises(UsageError, match="not a rule"):
        parse_rules((text,))


def test_sampling_without_a_word_about_redaction_is_refused():
    with pytest.raises(UsageError, match="redact"):
        check_config(AgentConfig(device="d", samples=SamplesConfig(per_day=3)))
    check_config(AgentConfig(device="d", samples=SamplesConfig(per_day=3, redact=("none",))))
    assert AgentConfig(device="d").samples.per_day == 0


def make_desk(tmp_path, now, *, asked, stored, **settings):
    return SampleDesk(
        config=SamplesConfig(**{"per_day": 3, "redact": ("none",), "max_bytes": 1000} | settings),
        folder=tmp_path,
        ask=lambda name, wanted: asked.append((name, wanted)),
        models=lambda: ("m", "n"),
        store=stored.append,
        now_s=lambda: now[0],
    )


def sampled(size):
    from edgekit.schema.message import SampleTensor

    tensor = SampleTensor(name="x", dtype="uint8", shape=(size,), data=bytes(size))
    return Sampled(model_digest="sha256:" + "a" * 64, prediction_id="p", tensors=(tensor,))


def test_quota_holds_over_restarts_and_a_new_day_gives_a_new_one(tmp_path):
    now, asked, stored = [86400.0 * 20_000], [], []
    desk = make_desk(tmp_path, now, asked=asked, stored=stored)
    assert [desk.take_turn(), desk.take_turn()] == [True, True]
    desk = make_desk(tmp_path, now, asked=asked, stored=stored)
    assert [desk.take_turn(), desk.take_turn()] == [True, False]
    assert [name for name, _ in asked] == ["m", "n", "m"]
    now[0] -= 86400.0
    assert not desk.take_turn(), "a clock that goes back gives no new day"
    now[0] += 2 * 86400.0
    assert desk.take_turn()


def test_bytes_of_a_day_are_bounded(tmp_path):
    now, asked, stored = [86400.0 * 20_000], [], []
    desk = make_desk(tmp_path, now, asked=asked, stored=stored)
    desk.take_turn()
    desk.receive(sampled(700))
    desk.take_turn()
    assert asked[1][1].max_bytes == 300
    desk.receive(sampled(301))
    assert len(stored) == 1
    assert len(encode(stored[0])) < MAX_BYTES
    again = make_desk(tmp_path, now, asked=asked, stored=stored)
    assert again.quota.size_bytes == 700


def test_damaged_quota_gives_nothing_today(tmp_path):
    (tmp_path / FILE).write_text("{")
    now, asked = [86400.0 * 20_000], []
    desk = make_desk(tmp_path, now, asked=asked, stored=[])
    assert not desk.take_turn()
    now[0] += 86400.0
    assert desk.take_turn()
